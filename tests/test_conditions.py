"""Other samplers and longer dialogues: what is generated again, and what it is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.conditions import Condition, compare_with_main, measure_condition
from pipeline.evaluation.replies import generate_replies
from pipeline.evaluation.scores import ConditionScores
from pipeline.files import read_json, read_jsonl, write_json, write_jsonl
from pipeline.gatt.assign import assign_evaluation
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.llama.model import Adapter
from pipeline.recipe import Dialogues, Evaluate, Recipe
from pipeline.records import (
    SAMPLERS,
    Constraint,
    CustomInstruction,
    Dialogue,
    Reply,
    Request,
)
from pipeline.report.tables import conditions_table, markdown

_RECIPE = Recipe(
    dialogues=Dialogues(system=""), evaluate=Evaluate(dialogues=2, turns=3, max_tokens=8)
)
_POOL = (Constraint("max_words", "4"), Constraint("lowercase"))


def _dialogues(pool: Sequence[Constraint] = _POOL) -> list[AssignedDialogue]:
    dialogues = [
        Dialogue(f"d{n}", "sea", tuple(f"{n}{turn}?" for turn in range(3))) for n in range(2)
    ]
    return assign_evaluation(dialogues, pool)


@pytest.fixture(scope="module")
def arms(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Arm]:
    folder = tmp_path_factory.mktemp("arms")
    base, adapter = folder / "base.gguf", folder / "adapter.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": base})
    write_adapter(open_base(tiny_llama), tiny_adapter, adapter)
    return [
        Arm(name="base", path=base),
        Arm(name="tuned", path=base, adapter=Adapter(adapter)),
        Arm(name="rival", path=base),
        Arm(name="ceiling", path=base, in_all_suites=False, repeats_instruction=True),
    ]


@pytest.fixture(scope="module")
def main(arms: list[Arm], tmp_path_factory: pytest.TempPathFactory) -> list[Reply]:
    """Return the replies of the evaluation itself."""
    log = tmp_path_factory.mktemp("main") / "replies.jsonl"
    return generate_replies(arms, {"evaluation": _dialogues()}, _RECIPE, [log])


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Record the requests for replies."""
    made: list[Request] = []

    def recorded(**fields: object) -> Request:
        made.append(Request(**fields))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr("pipeline.evaluation.replies.Request", recorded)
    return made


def _logged(file: Path) -> list[Reply]:
    return [Reply(**row) for _, row in read_jsonl(file)]


def test_interrupted_replies_resume_and_are_the_same(
    arms: list[Arm], main: list[Reply], tmp_path: Path
) -> None:
    """Half of the replies of every arm, and a line that a killed process has not finished."""
    log = tmp_path / "replies.jsonl"
    write_jsonl(log, main)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[::2]) + lines[1][:40])
    assert generate_replies(arms, {"evaluation": _dialogues()}, _RECIPE, [log]) == main
    records = [str(row) for _, row in read_jsonl(log)]
    assert len(records) == len(set(records)) == len(lines)


def test_longer_dialogues_go_on_from_the_replies_of_the_evaluation(
    arms: list[Arm], main: list[Reply], tmp_path: Path
) -> None:
    log = tmp_path / "c" / "gatt-5.jsonl"
    scores = measure_condition(Condition("gatt", 5), arms, _dialogues(), main, _RECIPE, [log])
    replies = _logged(log)
    assert len(replies) == 2 * 2 * 5  # base and tuned only
    early = [r for r in replies if r.turn <= 3]
    assert {repr(r) for r in early} == {repr(r) for r in main if r.arm in ("base", "tuned")}
    for row in scores.rows:
        late = [r for r in replies if r.arm == row.arm and r.turn >= 1]
        before = [r for r in main if r.arm == row.arm]
        assert row.at == "turns 1 to 5"
        assert (row.hits, row.n) == (sum(r.adherent for r in late), 10)
        assert (row.main.hits, row.main.n) == (sum(r.adherent for r in before), 6)
        assert row.difference.difference == pytest.approx(row.value - row.main.value)
    assert [row.arm for row in scores.rows] == ["base", "tuned"]
    again = measure_condition(Condition("gatt", 5), arms, _dialogues(), main, _RECIPE, [log])
    assert again.rows == scores.rows
    assert _logged(log) == replies  # nothing is generated twice


def test_a_dialogue_that_goes_on_keeps_the_messages_that_it_repeats(
    arms: list[Arm], tmp_path: Path, requests: list[Request]
) -> None:
    sources = [("1?", "on", "on"), ("2?", "on", "3?", "4?")]
    dialogues = [
        replace(assigned, dialogue=replace(assigned.dialogue, turns=turns))
        for assigned, turns in zip(_dialogues(), sources, strict=True)
    ]
    main = generate_replies(arms[:1], {"evaluation": dialogues}, _RECIPE, [tmp_path / "main.jsonl"])
    requests.clear()
    log = tmp_path / "gatt-5.jsonl"
    measure_condition(Condition("gatt", 5), arms[:1], dialogues, main, _RECIPE, [log])
    sent = [[m["content"] for m in r.messages if m["role"] == "user"] for r in requests]
    # The instruction stands before the first message.
    assert sorted(tuple(messages[1:]) for messages in sent) == [
        ("on", "3?", "4?"),
        ("on", "3?", "4?", "1?"),
        ("on", "on", "2?"),
        ("on", "on", "2?", "3?"),
    ]


def test_the_plain_sampler_draws_other_tokens_in_the_same_dialogues(
    arms: list[Arm], main: list[Reply], tmp_path: Path, requests: list[Request]
) -> None:
    log = tmp_path / "plain-3.jsonl"
    scores = measure_condition(Condition("plain", 3), arms, _dialogues(), main, _RECIPE, [log])
    assert {(r.temperature, r.top_p, r.sampler) for r in requests} == {SAMPLERS["plain"]}
    replies = {(r.arm, r.dialogue, r.turn): r.text for r in _logged(log)}
    before = {(r.arm, r.dialogue, r.turn): r.text for r in main}
    assert len(replies) == 12 and any(text != before[key] for key, text in replies.items())
    assert {row.at for row in scores.rows} == {"turns 1 to 3"}
    assert scores.values == SAMPLERS["plain"].values


@pytest.mark.parametrize(
    ("condition", "pool", "problem"),
    [
        (Condition("gatt", 3), _POOL, "the evaluation has 3 turns and measures that"),
        (Condition("plain", 2), _POOL, "--turns 2 with the sampler plain: the evaluation has 3"),
        (Condition("gatt", 7), _POOL, "--turns 7: the 2 evaluation dialogues do not have so many"),
        (Condition("plain", 3), (Constraint("style", "shout"),), "No program can check"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    condition: Condition, pool: tuple[Constraint, ...], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(GattError, match=re.escape(problem)) as error:
        measure_condition(condition, [], _dialogues(pool), [], _RECIPE, [tmp_path / "log"])
    assert "\n" not in str(error.value)


def test_instructions_that_nothing_checks_are_left_out(
    arms: list[Arm], main: list[Reply], tmp_path: Path
) -> None:
    (other,) = assign_evaluation(
        [Dialogue("d9", "sea", ("A?", "B?", "C?"))], [], [CustomInstruction(text="Be blunt.")]
    )
    log = tmp_path / "greedy-3.jsonl"
    dialogues = [*_dialogues(), other]
    measure_condition(Condition("greedy", 3), arms[:1], dialogues, main, _RECIPE, [log])
    assert {r.dialogue for r in _logged(log)} == {"d0", "d1"}


def _replies(
    obeyed: dict[int, Sequence[int]], turns: int, arms: Sequence[str] = ("base", "tuned")
) -> list[Reply]:
    """Return replies to dialogues by number, which obey in the given turns if tuned."""
    reply = Reply(
        arm="",
        dialogue="",
        turn=0,
        text="w",
        prompt_tokens=9,
        tokens=9,
        finish="stop",
        obeys=False,
        defect="",
    )
    return [
        replace(reply, arm=arm, dialogue=f"d{n}", turn=turn, obeys=arm == "tuned" and turn in in_)
        for arm in arms
        for n, in_ in obeyed.items()
        for turn in range(1, turns + 1)
    ]


def test_rows_are_paired_with_the_last_five_turns_of_the_evaluation(tmp_path: Path) -> None:
    all_turns = range(1, 41)
    main = _replies({0: all_turns, 1: all_turns}, 20)
    replies = _replies({0: all_turns, 1: range(1, 18)}, 40)
    rows = compare_with_main(Condition("plain", 40), replies, main)
    assert [(r.arm, r.at, r.hits, r.n, r.main.hits, r.main.n) for r in rows] == [
        ("base", "turns 16 to 20", 0, 10, 0, 10),
        ("base", "turns 36 to 40", 0, 10, 0, 10),
        ("tuned", "turns 16 to 20", 7, 10, 10, 10),
        ("tuned", "turns 36 to 40", 5, 10, 10, 10),
    ]
    late = rows[3].difference
    # Of two dialogues, resamples have none, one or both of that which fails.
    assert (late.difference, late.low, late.high, late.dialogues) == (-0.5, -1, 0, 2)
    # With the same sampler, the turns of the evaluation are its own replies.
    same = compare_with_main(Condition("gatt", 40), replies, main)
    assert [r.at for r in same] == ["turns 36 to 40"] * 2
    cut = [replace(r, finish="context") if r.turn > 30 else r for r in replies]
    assert {r.at for r in compare_with_main(Condition("gatt", 40), cut, main)} == {"turns 26 to 30"}

    file = tmp_path / "plain-40.json"
    values = SAMPLERS["plain"].values
    write_json(file, ConditionScores(sampler="plain", values=values, turns=40, rows=rows))
    table = conditions_table([read_json(file, ConditionScores, "evaluate")])
    sampler = "plain: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no DRY"
    assert markdown(table).splitlines()[-1] == (
        f"| tuned | {sampler} | turns 36 to 40 | 50% (5 of 10) | 100% (10 of 10) | "
        "-50 (-100 to +0) |"
    )
