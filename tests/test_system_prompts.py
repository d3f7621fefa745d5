"""A hundred system prompts of the kinds that people publish: each gets a figure."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.custom_instructions import with_distinct_names
from pipeline.data.instruction_files import read_instructions
from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.fidelity import measure_fidelity
from pipeline.gatt.assign import assign_evaluation
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import is_judged, obeys, prepare
from pipeline.gatt.text import words
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.recipe import Evaluate, Recipe
from pipeline.records import CustomInstruction, Dialogue, Reply

_FILE = Path(__file__).parent / "data" / "system_prompts.toml"
_ANSWERS = ("A short one.", "Is it so?")


def _prompts() -> list[CustomInstruction]:
    """Return the prompts; without checks of IFEval where these are not installed."""
    custom = with_distinct_names(read_instructions(_FILE))
    checks = {check for c in custom for check in c.checks}
    usable = set()
    for check in checks:
        try:
            prepare(check)
            usable.add(check)
        except GattError:
            assert check.kind == "ifeval"
    return [replace(c, checks=tuple(k for k in c.checks if k in usable)) for c in custom]


def test_the_prompts_are_a_hundred_different_ones_of_published_lengths() -> None:
    prompts = read_instructions(_FILE)
    lengths = [len(prompt.text.split()) for prompt in prompts]
    assert len(prompts) == 100 and len({prompt.name for prompt in prompts}) == 100
    assert min(lengths) == 5 and 100 < max(lengths) <= 120
    assert sum(length < 20 for length in lengths) > 20
    assert sum(length > 40 for length in lengths) == 8
    vocabularies = [set(words(prompt.text)) for prompt in prompts]
    for first, second in itertools.combinations(vocabularies, 2):
        assert len(first & second) < 0.5 * len(first | second)
    places = Counter(prompt.place for prompt in prompts)
    assert min(places["system"], places["first"]) > 10
    checks = Counter(check.kind for prompt in prompts for check in prompt.checks)
    assert {"regex", "not_regex", "function", "ifeval", "rubric"} < checks.keys()
    assert 20 < sum(not prompt.checks for prompt in prompts) < 60


def _replies(assigned: AssignedDialogue, arm: str) -> list[Reply]:
    """Return two answers with the verdicts of their checks."""
    return [
        Reply(
            arm=arm,
            dialogue=assigned.dialogue.id,
            turn=turn,
            text=text,
            prompt_tokens=9,
            tokens=9,
            finish="stop",
            obeys=obeys(
                assigned.constraints(0), text, assigned.student_prompt(_ANSWERS[: turn - 1], "")
            )
            if assigned.constraints(0)
            else None,
            defect="",
        )
        for turn, text in enumerate(_ANSWERS, 1)
    ]


def test_each_prompt_gets_a_figure(tiny_llama: Path, tmp_path: Path) -> None:
    """An adherence where a program or a judge can check it, else a reminder fidelity."""
    custom = _prompts()
    dialogues = [Dialogue(f"d{n}", "sea", ("Why?", "And then?")) for n in range(24)]
    evaluation = assign_evaluation(dialogues, [], custom)
    names = {prompt.name for prompt in custom}
    assert {assigned.name for assigned in evaluation} == names

    replies = [
        reply
        for arm in ("base", "tuned", "ceiling")
        for assigned in evaluation
        for reply in _replies(assigned, arm)
    ]
    scores = compute_scores(replies, {"evaluation": evaluation}, ())
    rated = {row.at for row in scores.by_instruction if row.arm == "tuned" and row.n == 2}
    assert rated == {prompt.name for prompt in custom if prompt.checks}
    assert set(scores.unchecked) == names - rated
    assert {0.0, 1.0} < {row.value for row in scores.by_instruction}  # the checks tell apart

    base, other = tmp_path / "base.gguf", tmp_path / "other.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": base, "Q8_0": other})
    arms = [Arm(name="base", path=base), Arm(name="tuned", path=other)]
    recipe = Recipe(evaluate=Evaluate(turns=2, max_tokens=8))
    fidelity = measure_fidelity(arms, evaluation, replies, recipe)
    assert fidelity
    scored = {row.at: row for row in fidelity.by_instruction}
    judged = {prompt.name for prompt in custom if is_judged(prompt.checks)}
    assert scored.keys() >= (names - rated) | judged
    assert all(row.base_kl > 0 and row.value != 0 for row in scored.values())
    assert rated | scored.keys() == names


def test_prompts_are_read_from_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    prompts = [prompt for prompt in read_instructions(_FILE) if not prompt.checks]
    for number, prompt in enumerate(prompts):
        (folder / f"{number:03}.md").write_text(prompt.text, encoding="utf-8")
    assert [p.text for p in read_instructions(folder)] == [p.text for p in prompts]
