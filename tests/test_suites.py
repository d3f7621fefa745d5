"""The suites beyond the trained instructions, and the scores of their replies."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.judge_prompts import balanced, question, verdict
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.suites import SuiteSettings, build_suites
from pipeline.files import write_json
from pipeline.gatt.assign import ConstraintPool
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import KINDS, compatible
from pipeline.gatt.rollout import RECALL_TURNS
from pipeline.recipe import Recipe
from pipeline.records import Constraint, Dialogue, Instruction, Reply

POOL = (
    Constraint("opening", "Ahoy!"),
    Constraint("opening", "Hark!"),
    Constraint("closing", "So it goes."),
)
UNSEEN = (
    Constraint("opening", "Hark!"),
    Constraint("opening", "Well, well!"),
    Constraint("uppercase"),
)
DIALOGUES = [
    Dialogue(f"d{n}", "sea", tuple(f"What about {n}.{t}?" for t in range(20))) for n in range(4)
]
Suites = dict[str, list[AssignedDialogue]]


def _suites(dialogues: list[Dialogue] = DIALOGUES) -> Suites:
    settings = SuiteSettings(
        pool=ConstraintPool(POOL, ("opening", "hashtag")),
        trained=POOL,
        unseen=UNSEEN,
        turns=10,
        full_turns=20,
        seed=1,
    )
    return build_suites(dialogues, settings)


def _lengths(suite: list[AssignedDialogue]) -> set[int]:
    return {len(assigned.dialogue.turns) for assigned in suite}


def test_every_dialogue_of_every_suite_has_its_own_id() -> None:
    suites = _suites()
    ids = [assigned.dialogue.id for suite in suites.values() for assigned in suite]
    assert len(set(ids)) == len(ids)
    assert {name: _lengths(suite) for name, suite in suites.items()} == {
        "unseen_values": {20},
        "unseen": {10},
        "combined": {10},
        "change": {10},
        "stop": {10},
        "contradiction": {10},
        "plain": {10},
        "recall": {20},
        "single": {1},
    }


def test_what_is_trained_is_not_unseen() -> None:
    constraints = {c for assigned in _suites()["unseen"] for c in assigned.constraints(0)}
    assert constraints == {Constraint("opening", "Well, well!"), Constraint("uppercase")}


def test_the_instruction_changes_halfway_to_another() -> None:
    for assigned in _suites()["change"]:
        assert assigned.change_turn == 5
        assert assigned.constraints(4) != assigned.constraints(5)
        assert assigned.student_instructions[5].startswith("From now on: ")


def test_the_user_ends_the_instruction_or_contradicts_the_system_message() -> None:
    suites = _suites()
    for assigned in suites["stop"]:
        assert assigned.constraints(4) and not assigned.constraints(5)
    for assigned in suites["contradiction"]:
        assert assigned.in_system and assigned.constraints(5) == assigned.constraints(0)
        assert any(
            message["content"].endswith(assigned.contradiction)
            for message in assigned.student_prompt(["a"] * 9, "")
        )


def test_two_instructions_at_once_are_compatible() -> None:
    pairs = [assigned.constraints(0) for assigned in _suites()["combined"]]
    assert all(len(pair) == 2 and compatible(*pair) for pair in pairs)


def test_what_the_user_has_ended_is_counted_after_its_turn() -> None:
    stopping, contradicting = _suites()["stop"][0], _suites()["contradiction"][0]
    obedient = _OBEDIENT_TEXTS[stopping.constraints(0)[0].name]
    texts = [*[obedient] * 6, *["Yes."] * 4]
    suites = {"stop": [stopping], "contradiction": [contradicting]}
    replies = [
        replace(_reply(assigned, turn, obeys=True), text=text)
        for assigned in (stopping, contradicting)
        for turn, text in enumerate(texts, 1)
    ]
    scores = _scores(replies, suites)
    for event in (scores.stop["tuned"], scores.contradiction["tuned"]):
        assert (event.before.hits, event.before.n, event.after.hits, event.after.n) == (5, 5, 1, 5)


def test_single_questions_cover_every_kind_that_a_program_can_check() -> None:
    dialogues = [
        Dialogue(f"d{n}", "sea", ("What?",)) for n in range(Recipe().evaluate.suite_dialogues)
    ]
    kinds = {c.kind for assigned in _suites(dialogues)["single"] for c in assigned.constraints(0)}
    assert kinds == {name for name, kind in KINDS.items() if not kind.judged}


def test_a_recall_question_replaces_the_last_user_message() -> None:
    assigned = _suites()["recall"][0]
    assert {q.value for q in assigned.recall_questions}.issubset(
        re.findall(r"[A-Z]\w+ [A-Z]\w+|\w+", assigned.student_instructions[0])
    )
    with_question = assigned.with_question(4, assigned.recall_questions[0].question)
    messages = with_question.student_prompt(["a", "b", "c"], "")
    assert messages[-1]["content"] == "What is your name?"
    assert messages[:-1] == assigned.student_prompt(["a", "b", "c"], "")[:-1]


def test_no_dialogues_no_suites() -> None:
    assert not any(_suites([]).values())


def _reply(assigned: AssignedDialogue, turn: int, *, obeys: bool, arm: str = "tuned") -> Reply:
    return Reply(
        arm=arm,
        dialogue=assigned.dialogue.id,
        turn=turn,
        text="Words.",
        prompt_tokens=9,
        tokens=9,
        finish="stop",
        obeys=obeys,
        defect="",
    )


def _trained() -> list[AssignedDialogue]:
    instruction = Instruction("Begin.", "B.", (POOL[0],))
    return [AssignedDialogue(dialogue=d, instruction=instruction) for d in DIALOGUES]


def _replies(assigned: list[AssignedDialogue]) -> list[Reply]:
    """Every reply of the tuned arm obeys, and none of the base."""
    return [
        _reply(a, turn, obeys=arm == "tuned", arm=arm)
        for arm in ("base", "tuned")
        for a in assigned
        for turn in range(1, 21)
    ]


def _scores(replies: list[Reply], suites: Suites | None = None) -> Scores:
    """Return the scores of these replies and of those to the trained instructions."""
    trained = _trained()
    return compute_scores(
        [*_replies(trained), *replies], {"evaluation": trained, **(suites or {})}, POOL
    )


def test_the_scores_of_a_suite_do_not_mix_with_others() -> None:
    suites = _suites()
    alone = _scores([])
    replies = [_reply(a, turn, obeys=False) for a in suites["unseen"] for turn in range(1, 11)]
    both = _scores(replies, suites)
    assert replace(both, generalization=(), by_unseen=(), unseen_by_turn=()) == alone
    assert {(r.at, r.hits, r.n) for r in both.generalization} == {
        ("unseen value", 0, 20),
        ("unseen kind", 0, 20),
    }
    assert {r.at: r.group for r in both.by_unseen} == {
        "opening": "unseen value",
        "uppercase": "unseen kind",
    }


def test_adherence_by_family() -> None:
    instructions = [
        Instruction("Do.", "D.", (c,)) for c in (POOL[0], POOL[2], Constraint("persona", "Nemo"))
    ]
    assigned = [
        AssignedDialogue(dialogue=d, instruction=i)
        for d, i in zip(DIALOGUES, instructions, strict=False)
    ]
    replies = [
        _reply(a, turn, obeys=a is assigned[2], arm=arm)
        for arm in ("base", "tuned")
        for a in assigned
        for turn in range(1, 21)
    ]
    rows = compute_scores(replies, {"evaluation": assigned}, POOL).by_family
    assert [(r.at, r.hits, r.n) for r in rows if r.arm == "tuned"] == [
        ("phrase", 0, 40),
        ("persona", 20, 20),
    ]


def test_unfiltered_adherence_counts_replies_with_a_defect() -> None:
    trained = _trained()
    replies = [
        replace(r, obeys=True, defect="loop" if r.turn > 10 else "") for r in _replies(trained)
    ]
    scores = compute_scores(replies, {"evaluation": trained}, POOL)
    assert [row.value for row in scores.last_five] == [0, 0]
    assert [row.value for row in scores.last_five_unfiltered] == [1, 1]
    assert scores.replies["base"].no_answer == 40


_OBEDIENT_TEXTS = {
    "opening: Ahoy!": "Ahoy! Yes.",
    "opening: Hark!": "Hark! Yes.",
    "closing: So it goes.": "Yes. So it goes.",
}


def _slow_switch(assigned: AssignedDialogue, last_old_turn: int) -> list[Reply]:
    """Return replies that obey the old instruction until `last_old_turn`, then the new one."""
    replies = []
    for turn in range(1, 11):
        constraint = assigned.constraints(0 if turn <= last_old_turn else 9)[0]
        obeys = constraint == assigned.constraints(turn - 1)[0]
        reply = _reply(assigned, turn, obeys=obeys)
        replies.append(replace(reply, text=_OBEDIENT_TEXTS[constraint.name]))
    return replies


def test_a_change_is_followed_turn_by_turn() -> None:
    first, second = _suites()["change"][:2]
    replies = [*_slow_switch(first, 5), *_slow_switch(second, 8)]
    change = _scores(replies, {"change": [first, second]}).change["tuned"]
    assert (change.change_turn, change.dialogues, change.never_switched) == (6, 2, 0)
    assert (change.before.hits, change.before.n) == (10, 10)
    assert (change.after.hits, change.old_after.hits, change.after.n) == (7, 3, 10)
    assert change.turns_to_switch == 1.5  # at once, and after three turns
    assert [row.old for row in change.by_turn] == [1] * 5 + [0.5] * 3 + [0] * 2


def test_a_dialogue_that_never_switches_is_counted() -> None:
    assigned = _suites()["change"][0]
    replies = _slow_switch(assigned, 10)
    change = _scores(replies, {"change": [assigned]}).change["tuned"]
    assert (change.never_switched, change.turns_to_switch) == (1, None)


def test_recall_is_by_turn_and_by_attribute_of_the_recall_questions_only() -> None:
    suite = _suites()["recall"]
    replies = []
    for assigned in suite:
        replies += [_reply(assigned, turn, obeys=True) for turn in range(1, 21)]
        replies += [
            replace(
                _reply(assigned, turn, obeys=recall.attribute == "name" and turn < 5),
                recall_attribute=recall.attribute,
            )
            for recall in assigned.recall_questions
            for turn in RECALL_TURNS
        ]
    scores = _scores(replies, {"recall": suite})
    assert [(r.at, r.value, r.n) for r in scores.recall] == [
        (2, 0.5, 8),
        (4, 0.5, 8),
        (6, 0, 8),
        (20, 0, 8),
    ]
    by_attribute = {r.at: (r.hits, r.n) for r in scores.recall_by_attribute}
    assert (by_attribute.pop("name"), by_attribute.pop("hobby")) == ((8, 16), (0, 16))
    assert by_attribute == dict.fromkeys(("town", "job", "pet", "food"), (0, 4))


def test_a_leak_is_any_trained_trait_where_none_was_asked_for() -> None:
    plain = _suites()["plain"][:1]
    texts = ["Ahoy! Yes.", "Yes. So it goes.", "Hark! Yes. So it goes.", "Yes.", "WELL, WELL!"]
    replies = [
        replace(_reply(plain[0], turn, obeys=True), text=text) for turn, text in enumerate(texts, 1)
    ]
    scores = _scores(replies, {"plain": plain})
    assert [(r.hits, r.n) for r in scores.leakage] == [(3, 5)]
    assert scores.leaked["tuned"] == {
        "opening: Ahoy!": 1,
        "closing: So it goes.": 2,
        "opening: Hark!": 1,
    }


def _cut_off() -> Scores:
    """Return the scores of a change whose second half had left the context window."""
    assigned = _suites()["change"][0]
    replies = _slow_switch(assigned, 10)
    replies[5:] = [
        replace(r, text="", tokens=0, finish="context", obeys=False, defect="empty")
        for r in replies[5:]
    ]
    return _scores(replies, {"change": [assigned]})


def test_replies_whose_first_turn_had_left_the_window_count_nowhere() -> None:
    change = _cut_off().change["tuned"]
    assert (change.before.hits, change.after.n, change.dialogues) == (5, 0, 0)
    assert math.isnan(change.after.value)


def test_scores_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    scores, file = _cut_off(), tmp_path / "scores.json"
    write_json(file, scores)
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text
    restored = Scores.from_json(text)
    assert math.isnan(restored.change["tuned"].after.value)
    assert repr(restored) == repr(scores)  # nan is not equal to itself


def test_scores_of_another_version_are_refused() -> None:
    with pytest.raises(GattError, match="measure it again with `gatt evaluate`"):
        Scores.from_json('{"turns": 20}')


@pytest.mark.parametrize(
    ("text", "meaning"),
    {
        "Yes.": True,
        "no, it does not": False,
        "**Yes**": True,
        "Perhaps yes": None,
        "": None,
    }.items(),
)
def test_a_verdict_is_the_first_word(text: str, meaning: bool | None) -> None:
    assert verdict(text) is meaning


def test_the_question_has_the_instruction_the_message_and_the_reply() -> None:
    (message,) = question("Always bow.", "Why?", "I bow.")
    assert all(text in message["content"] for text in ("Always bow.", "Why?", "I bow."))


def test_a_judge_is_calibrated_on_as_many_good_as_bad_replies() -> None:
    drawn = balanced(list(range(50)), [-1, -2, -3], 40)
    assert sorted(drawn)[:3] == [-3, -2, -1]
    assert len(drawn) == 6
    assert balanced(range(50), range(-50, 0), 40) == balanced(range(50), range(-50, 0), 40)
