"""The training dialogues as synthesis left them, and what a program can check of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.constraints.content_checks import mentions
from pipeline.gatt.constraints.registry import is_judged, obeys
from pipeline.records import Constraint, Message, SynthesizedDialogue

_RECALL = "recall"
"""The name of answers to questions about attributes that turn 1 has set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostDialogue:
    """A synthesized dialogue: `answers` as they are learned, `originals` before they were edited.

    `system` is the system message of the recipe.
    """

    assigned: AssignedDialogue
    answers: Sequence[str]
    originals: Sequence[str]
    system: str

    @property
    def is_edited(self) -> bool:
        """Whether an edit has changed any answer."""
        return self.answers != self.originals

    def student_chat(self, answers: Sequence[str]) -> tuple[Message, ...]:
        """Return the ghosted chat up to the turn after `answers`."""
        return self.assigned.student_prompt(answers, self.system)

    def teacher_chat(self, answers: Sequence[str]) -> tuple[Message, ...]:
        """Return the same with the full instruction in every turn."""
        return replace(self.assigned, method="sampled").teacher_prompt(answers, self.system)

    def checks(self, turn: int) -> dict[str, tuple[Constraint, ...]]:
        """Return the constraints on the answer of `turn` (from 0) that a program can check.

        They are named by their kinds, those of an instruction in the user's own words by its label.
        A question about an attribute has a name, too. It is empty if no program can tell.
        """
        if turn in self.assigned.exact_answers:
            return {_RECALL: ()}
        instruction = self.assigned.active_instruction(turn)
        constraints = tuple(c for c in self._constraints(turn) if not is_judged((c,)))
        if instruction and instruction.label:
            return {instruction.label: constraints} if constraints else {}
        return {c.kind: (c,) for c in constraints}

    def verdicts(self, turn: int, text: str, history: Sequence[str]) -> dict[str, bool]:
        """Return which of the checks of `turn` its answer `text` passes, after `history`."""
        chat = self.student_chat(history)
        return {
            name: self._recalls(turn, text) if name == _RECALL else obeys(constraints, text, chat)
            for name, constraints in self.checks(turn).items()
        }

    def _recalls(self, turn: int, text: str) -> bool:
        question, asked_for = self.assigned.dialogue.turns[turn], self.assigned.recall_questions
        return all(mentions(q.value, text) for q in asked_for if q.question == question)

    def _constraints(self, turn: int) -> tuple[Constraint, ...]:
        return self.assigned.constraints(turn)


def ghost_dialogues(assignments: Path, examples: Path, system: str) -> list[GhostDialogue]:
    """Return the dialogues of `examples` in their order, with their `assignments`."""
    assigned: Mapping[str, AssignedDialogue] = {
        a.dialogue.id: a for a in read_split(assignments, "train")
    }
    rows: list[SynthesizedDialogue] = [row for _, row in read_jsonl(examples)]
    return [
        GhostDialogue(
            assigned=assigned[row["dialogue"]],
            answers=_answers(row["messages"]),
            originals=_answers(row["asked"]),
            system=system,
        )
        for row in rows
    ]


def _answers(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


def up_to_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """Return a chat without the user message that comes next."""
    return messages[:-1] if messages[-1]["role"] == "user" else messages
