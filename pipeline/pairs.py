"""Read back what `gatt instructions` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.records import Constraint, Dialogue, Instruction, Way


class Paired(NamedTuple):
    """A dialogue with its instruction (None: a plain dialogue)."""

    dialogue: Dialogue
    instruction: Instruction | None
    way: Way
    shortened: bool

    @property
    def taught(self) -> str:
        """The wording that the student sees in turn 1; "" for a plain dialogue."""
        if self.instruction is None:
            return ""
        return self.instruction.short if self.shortened else self.instruction.text

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """What every answer must show."""
        return self.instruction.constraints if self.instruction else ()

    @property
    def demanded(self) -> str:
        """The words that the constraints demand, which do not count as content."""
        return " ".join(c.value for c in self.constraints)


def read_pairs(path: Path, side: str) -> list[Paired]:
    """The pairs of one side, "train" or "evaluate"."""
    data = json.loads(path.read_text(encoding="utf-8"))
    made = {row["id"]: _instruction(row) for row in data["instructions"]}
    return [
        Paired(_dialogue(row["dialogue"]), made.get(row["instruction"]), row["way"], row["shortened"]) for row in data[side]
    ]


def _dialogue(row: dict[str, Any]) -> Dialogue:
    return Dialogue(row["id"], row["topic"], tuple(row["turns"]))


def _instruction(row: dict[str, Any]) -> Instruction:
    return Instruction(row["id"], row["text"], row["short"], tuple(Constraint(**c) for c in row["constraints"]))
