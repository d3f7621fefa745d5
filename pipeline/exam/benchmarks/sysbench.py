"""SysBench (Qin et al. 2024, arXiv 2408.10943): system messages over five turns, in Chinese.

The file is `system_benchmark_eval_datas.json` of PKU-Baichuan-MLSystemLab/SysBench: a list of
dialogues with `system_id`, `system_prompt`, `messages`, `rounds_related`, and in `prompt_infos`, by
the text of the user message, its `alignment` and its `criteria`. All criteria are for a judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.data.text_files import Row
from pipeline.errors import GattError
from pipeline.exam.benchmarks.base import (
    BenchmarkTask,
    TurnChecks,
    dialogue_task,
    parsed,
    rows_of,
)

_FORM = "a dialogue of SysBench (system_benchmark_eval_datas.json)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Criterion:
    criteria_content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    criteria: dict[str, _Criterion]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialogue:
    system_id: str | int
    system_prompt: str
    messages: list[_Message]
    prompt_infos: dict[str, _Prompt]
    rounds_related: bool = False


def read(path: Path) -> list[BenchmarkTask]:
    """Return the dialogues; their parts are "related" and "parallel" turns.

    Raises:
        GattError: the file has another form.
    """
    return [_task(row) for row in rows_of(path)]


def _task(row: Row) -> BenchmarkTask:
    dialogue = parsed(row, _Dialogue, _FORM)
    turns = [m.content for m in dialogue.messages if m.role == "user"]
    checks = {}
    for number, turn in enumerate(turns, 1):
        if turn not in dialogue.prompt_infos:
            raise GattError(
                f"{row.place}: prompt_infos has nothing about user message {number}. Expected "
                f"{_FORM}."
            )
        checks[number] = TurnChecks(unchecked=len(dialogue.prompt_infos[turn].criteria))
    part = "related" if dialogue.rounds_related else "parallel"
    name = str(dialogue.system_id)
    return dialogue_task(name, part, turns, checks, system=dialogue.system_prompt)
