"""What a public benchmark becomes: dialogues of the exam with checks of their own.

A reader turns each criterion of the published file into constraints that a program can check, or
leaves it to a judge. The two are counted apart: a turn is measured if something in it is checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.data.sources import read_rows
from pipeline.data.text_files import Row
from pipeline.errors import GattError
from pipeline.exam.tasks import ExamTask
from pipeline.files import decode_text, read_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys, prepare
from pipeline.records import Constraint, Dialogue, Reply

T = TypeVar("T")

_SAMPLE = "A short text."
"""What verifiers are tried on before the first answer is generated."""


class TurnChecks(NamedTuple):
    """The checks of one answer.

    Programs check `checked` criteria of it, with one constraint or more each; `unchecked` others
    need a judge, or a measure of the benchmark's authors.
    """

    constraints: tuple[Constraint, ...] = ()
    checked: int = 0
    unchecked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTask(ExamTask):
    """A dialogue of a benchmark; `checks` are those of its turns, from 1.

    With `probed`, they are about the answers to questions that leave no trace.
    """

    checks: Mapping[int, TurnChecks] = field(default_factory=dict)
    probed: bool = False
    ends_loops: ClassVar[bool] = False

    def is_kept(self, reply: Reply) -> bool | None:
        """Return whether a reply passes all checks of its turn, as the benchmark counts it.

        None: there is nothing that a program can check, or turn 1 did not fit in the context. That
        an answer repeats an earlier one is no fault here: labels of documents do.
        """
        constraints = self.checks.get(reply.turn, TurnChecks()).constraints
        if not constraints or reply.finish == "context":
            return None
        if self.probed and not reply.recall_attribute:
            return None
        return reply.finish != "thinking" and obeys(constraints, reply.text)

    def counts(self, turn: int, last: int, *, recall: bool, is_full: bool = False) -> bool:
        """Return whether an answer counts: that of every turn with a check does."""
        return turn in self.checks and recall == self.probed


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as read from a file or folder with this SHA-256."""

    name: str
    sha256: str
    tasks: tuple[BenchmarkTask, ...]


Reader = Callable[[Path], list[BenchmarkTask]]
"""Reads a file or folder.

Raises:
    GattError: it has another form.
"""


def dialogue_task(
    name: str,
    part: str,
    turns: Sequence[str],
    checks: Mapping[int, TurnChecks],
    *,
    system: str = "",
    given: Mapping[int, str] | None = None,
) -> BenchmarkTask:
    """Return the task of a dialogue with these user turns; `given` are answers not generated."""
    return BenchmarkTask(
        regime=part,
        assigned=AssignedDialogue(dialogue=Dialogue(name, part, tuple(turns))),
        system=system,
        first_counted=1,
        given=given or {},
        checks=checks,
    )


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the rows of a file: a JSON array, JSON Lines, a table, or Parquet.

    Raises:
        GattError: there is none, or it is in no form that is read.
    """
    if not path.is_file():
        expected = "a file, not a folder" if path.is_dir() else "an existing file"
        raise GattError(f"{path}: expected {expected}, as the benchmark's authors publish it.")
    if {".csv", ".tsv", ".parquet"} & set(path.suffixes):
        return read_rows(str(path.resolve()))
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the items of an array or the lines; a line with one list in it is a row, too."""
    text = decode_text(path.read_bytes(), path)
    if not text.lstrip().startswith("["):
        for number, value in read_jsonl(path):
            yield Row(value, f"{path}, line {number}", number)
        return
    try:
        values = json.loads(text)
    except ValueError as error:
        raise GattError(f"{path}: broken JSON ({error}). Fetch the file again.") from error
    for number, value in enumerate(values, 1):
        yield Row(value, f"{path}, item {number}", number)


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    """Return what validates values as `form`; it is slow to make, so each is made once."""
    return TypeAdapter(form)


def validated(value: object, form: type[T]) -> T:
    """Return a value as `form`.

    Raises:
        ValidationError: it is something else.
    """
    hashable_form: Any = form
    result: T = _adapter(hashable_form).validate_python(value)
    return result


def parsed(row: Row, form: type[T], expected: str) -> T:
    """Return a row as `form`, a dataclass or typed dictionary.

    Raises:
        GattError: it is something else.
    """
    try:
        return validated(row.value, form)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the row"
        raise GattError(
            f"{row.place}: {place}: {first['msg'].lower()}. Expected {expected}."
        ) from error


def verifier(name: str, arguments: Mapping[str, object]) -> Constraint:
    """Return the check by an IFEval verifier; arguments that are null are none."""
    given = {key: value for key, value in arguments.items() if value is not None}
    return Constraint("ifeval", f"{name} {json.dumps(given, ensure_ascii=False)}".strip())


def verifiers(names: Sequence[str], arguments: Sequence[Mapping[str, object]]) -> TurnChecks:
    """Return the checks of one answer by IFEval's verifiers."""
    return TurnChecks(tuple(map(verifier, names, arguments)), len(names))


def require_checks(benchmark: Benchmark) -> None:
    """Try every check, so that what is missing for one is known before anything is generated.

    Raises:
        GattError: a verifier is not installed, or lacks its data; or nothing can be checked.
    """
    constraints = {
        constraint
        for task in benchmark.tasks
        for checks in task.checks.values()
        for constraint in checks.constraints
    }
    if not constraints:
        raise GattError(
            f"{benchmark.name}: a program can check nothing of it, all criteria need a judge. Use "
            "a part or a benchmark with checks (pipeline/exam/benchmarks/README.md)."
        )
    tried: set[str] = set()
    for constraint in sorted(constraints, key=lambda c: (c.kind, c.value)):
        prepare(constraint)
        name = constraint.value.partition(" ")[0]
        if constraint.kind == "ifeval" and name not in tried:
            tried.add(name)
            obeys((constraint,), _SAMPLE)


def criteria(tasks: Sequence[BenchmarkTask]) -> tuple[int, int]:
    """Return how many criteria are checked by a program, and how many are not.

    A probe is one criterion, however often it is asked.
    """
    all_checks = [
        checks for task in tasks for checks in [*task.checks.values()][: 1 if task.probed else None]
    ]
    return sum(c.checked for c in all_checks), sum(c.unchecked for c in all_checks)
