"""StructFlowBench (Li et al. 2025, arXiv 2502.14494): constraints of turns that build on others.

The file is `StructFlowBench.json` of MLGroupJLU/StructFlowBench: a list of dialogues, `whole_conv`
their turns with `user prompt`, `assistant answer` and `constraints`, which are questions for a
judge. Those that ask for what can be counted are checked by a program here. As its authors do, each
turn is asked after the answers of the file, not after those of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.data.text_files import Row
from pipeline.exam.benchmarks.base import (
    BenchmarkTask,
    dialogue_task,
    parsed,
    rows_of,
)
from pipeline.exam.benchmarks.criteria import checks_of_questions

_FORM = "a dialogue of StructFlowBench (StructFlowBench.json)"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    user: Annotated[str, Field(validation_alias="user prompt")]
    answer: Annotated[str, Field(validation_alias="assistant answer")]
    constraints: list[_Question]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dialogue:
    conv_task: str
    whole_conv: list[_Turn]


def read(path: Path) -> list[BenchmarkTask]:
    """Return a dialogue for each turn, in which only the last answer is generated.

    Their parts are the tasks, such as "Creative Writing".

    Raises:
        GattError: the file has another form.
    """
    return [task for row in rows_of(path) for task in _tasks(row)]


def _tasks(row: Row) -> Iterator[BenchmarkTask]:
    dialogue = parsed(row, _Dialogue, _FORM)
    turns = dialogue.whole_conv
    part = dialogue.conv_task.partition(":")[0].strip() or "dialogues"
    prompts = [turn.user for turn in turns]
    given = {n: turn.answer for n, turn in enumerate(turns, 1)}
    for number, turn in enumerate(turns, 1):
        checks = checks_of_questions([c.content for c in turn.constraints])
        yield dialogue_task(
            f"{row.number:03}-{number}",
            part,
            prompts[:number],
            {number: checks},
            given={n: answer for n, answer in given.items() if n < number},
        )
