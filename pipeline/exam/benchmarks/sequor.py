"""SEQUOR (Canaverde et al. 2026, arXiv 2605.06353): realistic constraints over 50 turns.

A test set of BeatrizCanaverde/SEQUOR is a folder (`data/testsets/single`, `tuples`, `replace`,
`add`, `everything`) with one JSONL file for each dialogue: a line is a turn, with its `prompt` and
`constraints_data`, the constraints that hold then (`id`, `text`). The authors ask a judge about
each; those whose text says exactly what is to be counted are checked by a program here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.errors import GattError
from pipeline.exam.benchmarks.base import (
    BenchmarkTask,
    dialogue_task,
    parsed,
    rows_of,
)
from pipeline.exam.benchmarks.criteria import checks_of_requests

_FORM = "a turn of SEQUOR (a JSONL file of data/testsets)"
_MAX_TURNS = 50
"""As the authors measure; the files go on."""
_REGIMES = ("single", "tuples", "replace", "add", "everything")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requirement:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    prompt: str
    constraints_data: list[_Requirement]


def read(path: Path) -> list[BenchmarkTask]:
    """Return the dialogues of a folder, or of one file; their parts are the regimes.

    Raises:
        GattError: there is no file, or one has another form.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise GattError(f"{path} has no JSONL files. Expected a folder of SEQUOR's data/testsets.")
    return [_task(file, path) for file in files]


def _task(file: Path, folder: Path) -> BenchmarkTask:
    rows = [parsed(row, _Turn, _FORM) for row in islice(rows_of(file), _MAX_TURNS)]
    if not rows:
        raise GattError(f"{file} is empty. Expected {_FORM}.")
    parts = file.resolve().parts[:-1]
    part = next((name for name in reversed(parts) if name in _REGIMES), "dialogues")
    name = file.relative_to(folder).with_suffix("").as_posix() if file != folder else file.stem
    checks = {
        number: checks_of_requests([c.text for c in row.constraints_data])
        for number, row in enumerate(rows, 1)
    }
    return dialogue_task(name, part, [row.prompt for row in rows], checks)
