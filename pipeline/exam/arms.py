"""The arms of the exam: what a user can do without training so that an instruction holds.

A reminder is appended to a user message, after the text. Reminders of `every` turn, after every k
turns and after an answer that `failed` stay in the chat, as a user would leave them. A note at
`depth` d is in the prompt only, always d messages before its end (the "author's note" of role-play
programs).
The arm `steer` adds nothing to a prompt: `steering` has what it does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import GattError, did_you_mean
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.ghost import with_instruction
from pipeline.records import Message

DEFAULT_ARMS = ("once", "every", "every-5", "depth-4", "system", "failed")
ONCE = "once"
_REMINDER = "Reminder: "
_NUMBERED = re.compile(r"(every(?=-[1-9])|depth)-(\d\d?)")
_STEERED = re.compile(r"steer-(\d\d?(?:\.\d\d?)?)")
_STEER_STRENGTH = 1.0
"""With half of it little changes on the embedded model, with twice as much its answers break."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The chat up to the next answer; `added` has what the arm added to each message, or ""."""

    messages: tuple[Message, ...]
    added: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """How the model is reminded; `number` is that of "every-5" and "depth-4".

    `strength` multiplies the control vector of "steer".
    """

    name: str
    kind: Literal["once", "every", "depth", "system", "failed", "steer"]
    number: int = 0
    strength: float = 0.0

    def prompt(self, assigned: AssignedDialogue, answers: Sequence[str], system: str) -> Prompt:
        """Return the chat up to the next answer."""
        messages = assigned.student_prompt(answers, system)
        start = int(messages[0]["role"] == "system")
        added = [""] * len(messages)
        for turn in self._turns(assigned, answers):
            # A note that moves says what holds now, others what held when they were written.
            holds = holding(assigned, len(answers) if self.kind == "depth" else turn)
            if holds and not _states(assigned, turn):
                added[start + 2 * turn] = f"{_REMINDER}{holds}"
        if self.kind == "system" and not assigned.in_system:
            return _with_system(messages, holding(assigned, len(answers)))
        reminded: list[Message] = [
            {"role": m["role"], "content": with_instruction(text, m["content"])}
            for m, text in zip(messages, added, strict=True)
        ]
        return Prompt(tuple(reminded), tuple(added))

    def _turns(self, assigned: AssignedDialogue, answers: Sequence[str]) -> list[int]:
        """Return the turns (from 0) whose user message has a reminder."""
        current = len(answers)
        match self.kind:
            case "every":
                return list(range(self.number, current + 1, self.number))
            case "depth":
                turn = current - self.number // 2
                return [turn] if turn > 0 else []
            case "failed":
                return [n + 1 for n, answer in enumerate(answers) if _fails(assigned, n, answer)]
            case _:
                return []


_WITHOUT_NUMBER = {
    ONCE: Arm(ONCE, "once"),
    "every": Arm("every", "every", 1),
    "system": Arm("system", "system"),
    "failed": Arm("failed", "failed"),
    "steer": Arm("steer", "steer", strength=_STEER_STRENGTH),
}


def find_arms(names: Sequence[str]) -> list[Arm]:
    """Return the arms called `names`, without repeats; by default all of `DEFAULT_ARMS`.

    Raises:
        GattError: no such arm.
    """
    return [_find_arm(name) for name in dict.fromkeys(names or DEFAULT_ARMS)]


def _find_arm(name: str) -> Arm:
    if name in _WITHOUT_NUMBER:
        return _WITHOUT_NUMBER[name]
    if (steered := _STEERED.fullmatch(name)) and float(steered[1]):
        return Arm(name, "steer", strength=float(steered[1]))
    match = _NUMBERED.fullmatch(name)
    if not match:
        raise GattError(
            f"No arm {name!r}. Expected once, every, every-K (in turns K+1, 2K+1, ...), depth-D "
            "(a note D messages before the end), system, failed, steer or steer-S (a control "
            f"vector; S is the strength). {did_you_mean(name, _WITHOUT_NUMBER)}".rstrip()
        )
    number = int(match[2])
    if match[1] == "every":
        return Arm(name, "every", number)
    if number % 2:
        raise GattError(
            f"{name}: a note stands in a user message, so its depth is even. Take "
            f"depth-{number - 1 or 2}."
        )
    return Arm(name, "depth", number)


def holding(assigned: AssignedDialogue, turn: int) -> str:
    """Return the wording of a reminder in `turn` (from 0); "" if nothing holds."""
    instruction = assigned.active_instruction(turn)
    return instruction.short if instruction and instruction.text else ""


def _states(assigned: AssignedDialogue, turn: int) -> bool:
    """Return whether the instruction is given in `turn`, so that no reminder is needed."""
    is_changed = assigned.next_instruction is not None and turn == assigned.change_turn
    return turn == 0 or is_changed


def _fails(assigned: AssignedDialogue, turn: int, answer: str) -> bool:
    """Return whether the answer of `turn` (from 0) does not pass the check of what holds."""
    constraints = assigned.constraints(turn)
    return bool(constraints) and not obeys(constraints, answer)


def _with_system(messages: Sequence[Message], holds: str) -> Prompt:
    """Return the chat with what holds now in the system message."""
    rest = messages[int(messages[0]["role"] == "system") :]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    text = f"{system} {holds}".strip()
    if not text:
        return Prompt(tuple(messages), ("",) * len(messages))
    first: Message = {"role": "system", "content": text}
    return Prompt((first, *rest), (holds, *[""] * len(rest)))
