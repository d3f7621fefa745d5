"""A real model as the judge: what it is tried on, whose verdict counts, and that a verdict is asked for once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.judge import judge
from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.instructions import render_instruction
from pipeline.recipe import Evaluate, Recipe
from pipeline.records import Constraint, Dialogue, Reply
from pipeline.run_dir import RunDir
from pipeline.stages.evaluate import arms
from pipeline.stages.instructions import run

_STYLE, _OPENING = Constraint("style", "talk like a pirate"), Constraint("opening", "Ahoy!")


def _pairs() -> list[AssignedDialogue]:
    turns = ("Why is the sea salt?",) * 4
    return [
        AssignedDialogue(Dialogue(f"d{n}", "sea", turns), render_instruction((c,)), "plain")
        for n, c in enumerate((_STYLE, _OPENING))
    ]


def _replies() -> list[Reply]:
    said = [
        ("d0", "Arr, it be the rocks, matey!", True),
        ("d0", "The question is of chemistry.", True),
        ("d1", "Ahoy! Rivers bring it.", True),
        ("d1", "Rivers bring it.", False),
    ]
    replies = [
        Reply("tuned", d, t + 1, text, 9, 9, "stop", obeys, "")
        for t, (d, text, obeys) in enumerate(said)
    ]
    return [
        *replies,
        replace(replies[0], turn=2, probe="name"),
        replace(replies[1], turn=4, finish="context"),
    ]


def test_only_what_no_program_can_check_is_the_judges(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "judged.jsonl"
    settled, found = judge(str(base), _replies(), _pairs(), log)
    verdicts = {(row["dialogue"], row["turn"]): row["verdict"] for _, row in read_jsonl(log)}
    assert verdicts.keys() == {
        ("d0", 1),
        ("d0", 2),
        ("d1", 3),
        ("d1", 4),
    }  # no probe, and nothing out of the window
    assert [r.obeys for r in settled[:2]] == [bool(verdicts["d0", 1]), bool(verdicts["d0", 2])]
    assert settled[2:4] == _replies()[2:4]
    right = [verdicts["d1", 3] is True, verdicts["d1", 4] is False]
    assert (found["agreement"]["hits"], found["agreement"]["n"]) == (sum(right), 2)
    assert found["reliable"] == all(right)
    assert [(row["at"], row["n"]) for row in found["scores"]] == [("style: talk like a pirate", 2)]
    again, _ = judge(
        "no such model", _replies(), _pairs(), log
    )  # every verdict is known: nobody is asked
    assert again == settled


def test_a_style_needs_a_judge(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"instructions": {"pool": [{"kind": "style", "value": "talk like a pirate"}]}}
    )
    with pytest.raises(
        GattError, match=r"No program can check 'style: talk like a pirate'.*evaluate.judge"
    ):
        run(recipe, RunDir(tmp_path))


def test_others_are_servers_or_files_of_different_names(base: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    url = "http://127.0.0.1:8000/v1#big"
    found = arms(Recipe(evaluate=Evaluate(extra_models=(url, str(base)))), run_dir)
    expected = [("big", url, True), (base.stem, "", True), ("ceiling", "", False)]
    assert [(arm.name, arm.server, arm.whole) for arm in found[2:]] == expected
    with pytest.raises(GattError, match="two of the name 'big'"):
        arms(Recipe(evaluate=Evaluate(extra_models=(url, url))), run_dir)
