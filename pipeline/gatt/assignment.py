"""Read back what `gatt instructions` wrote: each dialogue with what it is to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.gatt.ghost import augment, ghost
from pipeline.records import (
    Constraint,
    Dialogue,
    Instruction,
    Message,
    RecallQuestion,
    SynthesisMethod,
)


@dataclass(frozen=True, slots=True)
class AssignedDialogue:
    """A dialogue with its instruction (None: a plain dialogue), which `then` replaces from turn `change` on."""

    dialogue: Dialogue
    instruction: Instruction | None
    method: SynthesisMethod
    shortened: bool = False
    in_system: bool = False
    next_instruction: Instruction | None = None
    change_turn: int = 0

    @property
    def name(self) -> str:
        """What is demanded, as tables show it."""
        asked = [i for i in (self.instruction, self.next_instruction) if i]
        return ", then ".join(", ".join(c.name for c in i.constraints) for i in asked) or "none"

    @property
    def recall_questions(self) -> tuple[RecallQuestion, ...]:
        """What is asked for in place of a turn's own message."""
        return self.instruction.recall_questions if self.instruction else ()

    @property
    def required_words(self) -> str:
        """The words that the constraints demand, which do not count as content."""
        return " ".join(
            c.value for i in (self.instruction, self.next_instruction) if i for c in i.constraints
        )

    def active_instruction(self, turn: int) -> Instruction | None:
        """The instruction that the answer of `turn` (from 0) is to obey."""
        return (
            self.next_instruction
            if self.next_instruction and turn >= self.change_turn
            else self.instruction
        )

    def constraints(self, turn: int) -> tuple[Constraint, ...]:
        """What the answer of `turn` must show."""
        instruction = self.active_instruction(turn)
        return instruction.constraints if instruction else ()

    @property
    def student_instructions(self) -> list[str]:
        """The wording in force in each turn, as the student sees it; "" in a plain dialogue."""
        turns = [self.active_instruction(turn) for turn in range(len(self.dialogue.turns))]
        wordings = [(i.short if self.shortened else i.text) if i else "" for i in turns]
        return [
            f"From now on: {w}" if i and i is self.next_instruction else w
            for i, w in zip(turns, wordings, strict=True)
        ]

    def teacher_prompt(self, answers: Sequence[str], system: str) -> tuple[Message, ...]:
        """The next turn as the teacher sees it: the instruction in every message where answers are sampled, else nowhere."""
        turns = range(len(self.dialogue.turns))
        told = [
            i.text if i and self.method == "sampled" else ""
            for i in map(self.active_instruction, turns)
        ]
        return augment(self.dialogue.turns, answers, told, system)

    def student_prompt(self, answers: Sequence[str], system: str) -> tuple[Message, ...]:
        """The dialogue up to the next turn (or the last answer) as the student sees it: ghosted."""
        users = self.dialogue.turns
        if self.in_system:
            return ghost(
                users,
                answers,
                [""] * len(users),
                f"{system} {self.student_instructions[0]}".strip(),
            )
        return ghost(users, answers, self.student_instructions, system)

    def with_question(self, turn: int, question: str) -> AssignedDialogue:
        """The same up to `turn` (from 1), where the user says `question` instead."""
        turns = (*self.dialogue.turns[: turn - 1], question)
        return replace(self, dialogue=replace(self.dialogue, turns=turns))


def read_split(path: Path, side: str) -> list[AssignedDialogue]:
    """The pairs of one side, "train" or "evaluate"."""
    return read_splits(path)[side]


def read_splits(path: Path) -> dict[str, list[AssignedDialogue]]:
    """All pairs of a file by side; in `suites.json` the sides are the suites of `gatt.suites`."""
    data = json.loads(path.read_text(encoding="utf-8"))
    made = {row["id"]: _instruction(row) for row in data.pop("instructions")}
    return {side: [_paired(row, made) for row in rows] for side, rows in data.items()}


def _paired(row: dict[str, Any], made: dict[str, Instruction]) -> AssignedDialogue:
    return AssignedDialogue(
        _dialogue(row["dialogue"]),
        made.get(row["instruction"]),
        row["way"],
        row["shortened"],
        row["in_system"],
        made.get(row["then"]),
        row["change"],
    )


def _dialogue(row: dict[str, Any]) -> Dialogue:
    return Dialogue(row["id"], row["topic"], tuple(row["turns"]))


def _instruction(row: dict[str, Any]) -> Instruction:
    recall_questions = tuple(RecallQuestion(**a) for a in row.get("asks", ()))
    return Instruction(
        row["id"],
        row["text"],
        row["short"],
        tuple(Constraint(**c) for c in row["constraints"]),
        recall_questions,
    )
