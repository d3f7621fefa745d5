"""A real model as the judge of replies that no program can check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.judge import judge
from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.instructions import render_instruction
from pipeline.recipe import Recipe
from pipeline.records import Constraint, Dialogue, Reply
from pipeline.run_dir import RunDir
from pipeline.stages.instructions import run

_STYLE, _OPENING = Constraint("style", "talk like a pirate"), Constraint("opening", "Ahoy!")


def _dialogue(dialogue_id: str, constraint: Constraint) -> AssignedDialogue:
    return AssignedDialogue(
        dialogue=Dialogue(dialogue_id, "sea", ("Why is the sea salt?",) * 4),
        instruction=render_instruction((constraint,)),
    )


def _reply(dialogue_id: str, turn: int, text: str, *, obeys: bool = True) -> Reply:
    return Reply(
        arm="tuned",
        dialogue=dialogue_id,
        turn=turn,
        text=text,
        prompt_tokens=9,
        tokens=9,
        finish="stop",
        obeys=obeys,
        defect="",
    )


_DIALOGUES = [_dialogue("style", _STYLE), _dialogue("opening", _OPENING)]
_UNCHECKED = [
    _reply("style", 1, "Arr, it be the rocks, matey!"),
    _reply("style", 2, "The question is of chemistry."),
]
_CHECKED = [
    _reply("opening", 3, "Ahoy! Rivers bring it."),
    _reply("opening", 4, "Rivers bring it.", obeys=False),
]
_NOT_MEASURED = [
    replace(_UNCHECKED[0], turn=2, recall_attribute="name"),
    replace(_UNCHECKED[1], turn=4, finish="context"),
]
_REPLIES = [*_UNCHECKED, *_CHECKED, *_NOT_MEASURED]


def _verdicts(log: Path) -> dict[tuple[str, int], bool | None]:
    return {(row["dialogue"], row["turn"]): row["verdict"] for _, row in read_jsonl(log)}


def test_the_judge_decides_only_what_no_program_can_check(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "judged.jsonl"
    replies, judgment = judge(str(base), _REPLIES, _DIALOGUES, log)
    verdicts = _verdicts(log)
    assert verdicts.keys() == {(r.dialogue, r.turn) for r in (*_UNCHECKED, *_CHECKED)}
    assert [r.obeys for r in replies[:2]] == [
        bool(verdicts["style", 1]),
        bool(verdicts["style", 2]),
    ]
    assert replies[2:] == _REPLIES[2:]
    agreed = [verdicts["opening", 3] is True, verdicts["opening", 4] is False]
    assert (judgment.agreement.hits, judgment.agreement.n) == (sum(agreed), 2)
    assert judgment.reliable == all(agreed)
    assert [(row.at, row.n) for row in judgment.scores] == [("style: talk like a pirate", 2)]


def test_verdicts_in_the_log_need_no_model(tmp_path: Path) -> None:
    log = tmp_path / "judged.jsonl"
    rows = [
        f'{{"arm": "tuned", "dialogue": "{r.dialogue}", "turn": {r.turn}, "verdict": false}}\n'
        for r in (*_UNCHECKED, *_CHECKED)
    ]
    log.write_text("".join(rows), encoding="utf-8")
    replies, judgment = judge("no such model", _REPLIES, _DIALOGUES, log)
    assert [r.obeys for r in replies[:2]] == [False, False]
    assert (judgment.agreement.hits, judgment.reliable) == (1, False)


def test_a_style_needs_a_judge(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"instructions": {"pool": [{"kind": "style", "value": "talk like a pirate"}]}}
    )
    with pytest.raises(
        GattError, match=r"No program can check 'style: talk like a pirate'.*evaluate.judge"
    ):
        run(recipe, RunDir(tmp_path))
