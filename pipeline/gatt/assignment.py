"""A dialogue with its instruction: what teacher and student see of it, and its file.

`gatt instructions` writes assignments by split ("train", "validation", "evaluation") to
`instructions/assignments.json`, and those of `evaluation.suites` by suite to `suites.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.files import read_json, write_json
from pipeline.gatt.constraints.custom_checks import function_files
from pipeline.gatt.constraints.registry import is_judged, required_words
from pipeline.gatt.ghost import CHANGE_PREFIX, augment, ghost
from pipeline.gatt.text import words
from pipeline.records import (
    Constraint,
    Dialogue,
    Instruction,
    Message,
    RecallQuestion,
    Reply,
    SynthesisMethod,
)

_FIXED_REPLY = re.compile(
    r'\b(?:only|exactly|nothing (?:but|else than))\b[^"“”.!?]*["“]([^"“”]+)["”]', re.IGNORECASE
)
_BYTES_PER_TOKEN = 3
"""Of a text; few tokens have less."""
_SHORT_TOKENS, _MESSAGE_TOKENS, _SYSTEM_TOKENS = 64, 40, 150
"""A short instruction, user message and system message, counted in this way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignedDialogue:
    """A dialogue and the instruction that its answers follow; None is a plain dialogue.

    `method` is how synthesis obtains the answers; evaluation does not use it. `shortened` shows
    the student `Instruction.short`, `in_system` puts it into the system message. In turn
    `change_turn` (from 0) something happens, at most one of two: `next_instruction` replaces
    `instruction` or ends it, or the user says `contradiction`, against an instruction in the system
    message, which holds. `exact_answers` has the training answers to recall questions by turn.
    If `baked`, the instruction is the teacher's system message, and the student has none.
    """

    dialogue: Dialogue
    instruction: Instruction | None = None
    method: SynthesisMethod = "plain"
    shortened: bool = False
    in_system: bool = False
    next_instruction: Instruction | None = None
    change_turn: int = 0
    contradiction: str = ""
    exact_answers: Mapping[int, str] = field(default_factory=dict)
    baked: bool = False

    @property
    def name(self) -> str:
        """Return the name of the instructions, as tables show it: "A, then B", or "none"."""
        return ", then ".join(i.name for i in self._instructions) or "none"

    @property
    def recall_questions(self) -> tuple[RecallQuestion, ...]:
        """Return the questions that may replace a user message, to test what is remembered."""
        return self.instruction.recall_questions if self.instruction else ()

    @property
    def required_words(self) -> str:
        """Return the words that answers owe to the constraints; they do not count as content."""
        return required_words([c for i in self._instructions for c in i.constraints])

    @property
    def is_custom(self) -> bool:
        """Whether the instruction is in the user's own words."""
        return bool(self.instruction and self.instruction.label)

    def needs_judge(self, turn: int) -> bool:
        """Return whether only a judge can tell if the answer of `turn` (from 0) obeys.

        The checks of a baked prompt are about some of its sentences only.
        """
        instruction = self.active_instruction(turn)
        if instruction is None:
            return False
        is_unchecked = bool(instruction.label) and (self.baked or not instruction.constraints)
        return is_unchecked or is_judged(instruction.constraints)

    @property
    def _instructions(self) -> list[Instruction]:
        return [i for i in (self.instruction, self.next_instruction) if i]

    def active_instruction(self, turn: int) -> Instruction | None:
        """Return the instruction that the answer of `turn` (from 0) has to follow."""
        if self.next_instruction and turn >= self.change_turn:
            return self.next_instruction
        return self.instruction

    def constraints(self, turn: int) -> tuple[Constraint, ...]:
        """Return the constraints on the answer of `turn` (from 0)."""
        instruction = self.active_instruction(turn)
        return instruction.constraints if instruction else ()

    def is_fixed(self, turn: int, text: str) -> bool:
        """Return whether the user's own words ask for `text`: 'Reply only: "Ask my lawyer."'.

        Such an answer is no repeat of an earlier one.
        """
        instruction = self.active_instruction(turn)
        if self.baked or not (instruction and instruction.label):
            return False
        return words(text) in [words(reply) for reply in _FIXED_REPLY.findall(instruction.text)]

    def with_verdict(self, reply: Reply, *, verdict: bool | None) -> Reply:
        """Return a reply that needs a judge with its verdict, which programs' checks may overrule.

        No verdict counts as a bad one.
        """
        programs = [c for c in self.constraints(reply.turn - 1) if not is_judged((c,))]
        return replace(reply, obeys=bool(verdict) and not (programs and reply.obeys is False))

    def criterion(self, turn: int) -> str:
        """Return what a judge is asked about the answer of `turn` (from 0)."""
        rubrics = [c.value for c in self.constraints(turn) if c.kind == "rubric"]
        instruction = self.active_instruction(turn)
        custom = instruction.text if instruction and instruction.label else ""
        return " ".join(rubrics) or custom or self.student_instructions[turn]

    @property
    def student_instructions(self) -> list[str]:
        """Return the instruction of each turn in the student's wording; "" is none."""
        return [self._student_wording(turn) for turn in range(len(self.dialogue.turns))]

    def _student_wording(self, turn: int) -> str:
        instruction = self.active_instruction(turn)
        if instruction is None:
            return ""
        if not instruction.text:
            return instruction.short
        wording = instruction.short if self.shortened else instruction.text
        return f"{CHANGE_PREFIX}{wording}" if instruction is self.next_instruction else wording

    def teacher_prompt(self, answers: Sequence[str], system: str) -> tuple[Message, ...]:
        """Return the chat up to the next turn, as the teacher sees it.

        Where answers are sampled, the full instruction stands in every user message; else nowhere.
        """
        if self.baked:
            return self.reminded_prompt(answers, system)
        instructions = [""] * len(self.dialogue.turns)
        if self.method == "sampled":
            active = map(self.active_instruction, range(len(self.dialogue.turns)))
            instructions = [i.text if i else "" for i in active]
        return augment(self.dialogue.turns, answers, instructions, system)

    def student_prompt(self, answers: Sequence[str], system: str) -> tuple[Message, ...]:
        """Return the ghosted chat up to the next turn (or the last answer): the student's view."""
        turns, instructions = self.dialogue.turns, self.student_instructions
        if self.baked:
            return augment(turns, answers, [""] * len(turns), "")
        if self.in_system:
            system = f"{system} {instructions[0]}".strip()
            instructions = [""] * len(turns)
            if self.contradiction and self.change_turn < len(turns):
                instructions[self.change_turn] = self.contradiction
        return ghost(turns, answers, instructions, system)

    def reminded_prompt(self, answers: Sequence[str], system: str) -> tuple[Message, ...]:
        """Return the chat up to the next turn with the student's instruction in every turn.

        If `baked`, the system message has it.
        """
        if self.baked and self.instruction:
            turns = self.dialogue.turns
            return augment(turns, answers, [""] * len(turns), self.instruction.text)
        return augment(self.dialogue.turns, answers, self.student_instructions, system)

    def further_tokens(self, turns: int, *, reminders: int = 1, system: str = "") -> int:
        """Return about how many tokens `turns` turns take beyond the room that a context has.

        It has room for short user messages, a short system message, and a short instruction in each
        of `reminders` turns. A baked instruction counts in full.
        """
        longest = max((_tokens(i.text) for i in self._instructions), default=0)
        instructions = longest if self.baked else reminders * max(0, longest - _SHORT_TOKENS)
        messages = sum(_tokens(text) - _MESSAGE_TOKENS for text in self.dialogue.turns[:turns])
        return instructions + max(0, messages) + max(0, _tokens(system) - _SYSTEM_TOKENS)

    def with_question(self, turn: int, question: str) -> AssignedDialogue:
        """Return the dialogue up to `turn` (from 1), with `question` as its user message."""
        turns = (*self.dialogue.turns[: turn - 1], question)
        return replace(self, dialogue=replace(self.dialogue, turns=turns))


def _tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    return len(text.encode()) // _BYTES_PER_TOKEN


Splits = Mapping[str, Sequence[AssignedDialogue]]
"""Assigned dialogues by split, or by evaluation suite."""


def write_splits(path: Path, splits: Splits) -> None:
    """Write dialogues by split as JSON, for `read_splits`."""
    write_json(path, splits)


def read_split(path: Path, split: str) -> list[AssignedDialogue]:
    """Return the dialogues of one split: "train", "validation" or "evaluation".

    Raises:
        GattError: as `read_splits`.
    """
    return read_splits(path)[split]


def held_out_turns(path: Path) -> set[str]:
    """Return the user turns of all dialogues for validation and evaluation.

    Raises:
        GattError: as `read_splits`.
    """
    splits = read_splits(path)
    held_out = (*splits["validation"], *splits["evaluation"])
    return {turn for assigned in held_out for turn in assigned.dialogue.turns}


def check_files(path: Path) -> list[Path]:
    """Return the Python files of the users' functions that check answers, out of a file of splits.

    Raises:
        GattError: as `read_splits`.
    """
    if not path.exists() or '"function"' not in path.read_text(encoding="utf-8"):
        return []
    return function_files(
        constraint
        for dialogues in read_splits(path).values()
        for assigned in dialogues
        for instruction in (assigned.instruction, assigned.next_instruction)
        for constraint in (instruction.constraints if instruction else ())
    )


def read_splits(path: Path) -> dict[str, list[AssignedDialogue]]:
    """Return all dialogues of a file by split; in `suites.json`, by suite.

    Raises:
        GattError: another version wrote the file.
    """
    return read_json(path, dict[str, list[AssignedDialogue]], "instructions")
