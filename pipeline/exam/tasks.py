"""The exam's dialogues: a frozen file of user turns and instructions, by regime.

`Instruction.text` is what the user says, `Instruction.short` what holds from then on: the wording
of reminders. `scripts/exam_set.py` wrote the file; a test pins its hash, and a change is a new
version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import TypeAdapter

from pipeline.errors import GattError, did_you_mean
from pipeline.files import sha256
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys
from pipeline.records import Dialogue, Instruction, Reply

EXAM_NAME, EXAM_VERSION = "gatt-exam", 1
REGIMES = {
    "first": "one instruction in the first message",
    "system": "one instruction in the system message",
    "three": "three instructions at once in the first message",
    "replaced": "another instruction replaces the first (counted from there on)",
    "added": "a second instruction is added (counted from there on: both)",
    "stopped": "the user ends the instruction (counted from there on: it no longer shows)",
    "contradicted": "the user contradicts the system message (counted from there on: it holds)",
    "long": "one instruction in the first message, and long answers",
    "attributes": "name, hobby and another fact, asked for later (turns 2, 4, 6, 20, 40, the last; "
    "in a full context also 60, 80, ...)",
}
"""What happens in the dialogues, by the name of the regime."""
_RECALL_TURNS = (2, 4, 6, 20, 40)
_LONG_FACTOR = 4
"""Long answers may have so many times the tokens of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredTask:
    """A dialogue as the file has it; the fields are those of `AssignedDialogue`."""

    id: str
    regime: str
    conversation: str
    instruction: Instruction
    next_instruction: Instruction | None = None
    change_turn: int = 0
    in_system: bool = False
    contradiction: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredExam:
    """The file: `conversations` are user turns by name."""

    name: str
    version: int
    system: str
    long_system: str
    conversations: dict[str, tuple[str, ...]]
    tasks: tuple[_StoredTask, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamTask:
    """A dialogue of the exam with its system message.

    Answers count from turn `first_counted` (from 1) on: earlier ones are those of other regimes.
    The answers in `given`, by turn, stand in the chat in place of the model's.
    """

    regime: str
    assigned: AssignedDialogue
    system: str
    first_counted: int
    max_tokens_factor: int = 1
    given: Mapping[int, str] = field(default_factory=dict)
    ends_loops: ClassVar[bool] = True
    """An answer that loops is no valid one, whatever follows, and no limit ends it."""

    @property
    def id(self) -> str:
        """Return the name of the dialogue."""
        return self.assigned.dialogue.id

    def is_kept(self, reply: Reply) -> bool | None:
        """Return whether a reply does what was asked for and is a valid answer.

        None: there is nothing to check, or turn 1 did not fit in the context. Where the user has
        ended the instruction, a reply that still follows it is not kept.
        """
        if reply.finish == "context":
            return None
        if reply.recall_attribute:
            return reply.adherent
        if self.regime == "stopped" and reply.turn >= self.first_counted:
            return not reply.defect and not obeys(self.assigned.constraints(0), reply.text)
        return None if reply.obeys is None else reply.adherent

    def counts(self, turn: int, last: int, *, recall: bool, is_full: bool = False) -> bool:
        """Return whether an answer in `turn` counts in a dialogue of `last` turns.

        Attributes are asked for in more turns; they count there once the context is full.
        """
        if recall:
            return is_full or turn in (*_RECALL_TURNS, last)
        return turn >= self.first_counted


class ExamIdentity(NamedTuple):
    """Which set of dialogues: the frozen one, or that of a benchmark's file."""

    name: str
    version: int
    sha256: str


def frozen_exam() -> ExamIdentity:
    """Return the identity of the frozen set."""
    return ExamIdentity(EXAM_NAME, EXAM_VERSION, exam_sha256())


def ordered_regimes(names: Iterable[str]) -> list[str]:
    """Return regimes, or parts of a benchmark, without repeats; those of the exam in its order."""
    unique = list(dict.fromkeys(names))
    own = [name for name in REGIMES if name in unique]
    return own + [name for name in unique if name not in REGIMES]


def exam_file() -> Path:
    """Return the frozen file."""
    return Path(str(files("pipeline.exam") / f"exam_{EXAM_VERSION}.json"))


def exam_sha256() -> str:
    """Return the SHA-256 of the frozen file."""
    return sha256(exam_file())


def exam_tasks(regimes: Sequence[str], per_regime: int, turns: int) -> list[ExamTask]:
    """Return the first `per_regime` dialogues (0: all) of each regime, with `turns` user turns.

    The regimes are in the order of the exam, each once.

    Raises:
        GattError: no such regime.
    """
    for regime in regimes:
        if regime not in REGIMES:
            hint = did_you_mean(regime, REGIMES)
            raise GattError(f"No regime {regime!r}. {hint} Expected one of {', '.join(REGIMES)}.")
    return [
        task
        for regime in ordered_regimes(regimes or REGIMES)
        for task in _of_regime(regime, turns)[: per_regime or None]
    ]


def _of_regime(regime: str, turns: int) -> list[ExamTask]:
    exam = _read()
    return [_task(exam, stored, turns) for stored in exam.tasks if stored.regime == regime]


def _task(exam: _StoredExam, stored: _StoredTask, turns: int) -> ExamTask:
    is_long = stored.regime == "long"
    assigned = AssignedDialogue(
        dialogue=Dialogue(stored.id, stored.regime, _user_turns(exam, stored, turns)),
        instruction=stored.instruction,
        next_instruction=stored.next_instruction,
        change_turn=stored.change_turn,
        in_system=stored.in_system,
        contradiction=stored.contradiction,
    )
    return ExamTask(
        regime=stored.regime,
        assigned=assigned,
        system=exam.long_system if is_long else exam.system,
        first_counted=stored.change_turn + 1 if stored.change_turn else 2,
        max_tokens_factor=_LONG_FACTOR if is_long else 1,
    )


def _user_turns(exam: _StoredExam, stored: _StoredTask, turns: int) -> tuple[str, ...]:
    """Return `turns` user turns: those of the dialogue's conversation, then those of the next."""
    names = list(exam.conversations)
    start = names.index(stored.conversation)
    in_order = (
        turn
        for round_ in range(-(-turns // len(exam.conversations[stored.conversation])))
        for turn in exam.conversations[names[(start + round_) % len(names)]]
    )
    return tuple(islice(in_order, turns))


@cache
def _read() -> _StoredExam:
    return TypeAdapter(_StoredExam).validate_json(exam_file().read_bytes())
