"""A chat as it stands: who said what under which instruction, and how often that was kept. Pure: a step gives a new value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.ghost import ghost, with_instruction
from pipeline.gatt.instructions import parse_instruction
from pipeline.gatt.quality import find_defect
from pipeline.records import Constraint, Message

CHANGE_PREFIX = "From now on: "
"""Before an instruction that is given in mid-conversation, as in the training data (pairs.py)."""
SUMMARY_REQUEST = "Sum up in a few sentences what we have talked about so far."
"""What the user is taken to have said where a summary stands in the place of turns."""

Mark = Literal["✓", "✗", "~"]
"""An answer that obeys, one that does not, and one that obeys without being an answer (a loop, a repeat, empty)."""

LAST_TURNS = 3
"""So many turns stay word for word when the middle is summed up."""
SUMMARY_TOKENS = 160
"""Of a summary at most."""


class StandingInstruction(NamedTuple):
    """An instruction in the user's words ("" for none), and what a program can check of it."""

    text: str = ""
    constraints: tuple[Constraint, ...] = ()


NO_INSTRUCTION = StandingInstruction()


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the user without the instruction, the instruction in force, and an answer of each model."""

    user: str
    instruction: StandingInstruction
    answers: tuple[str, ...]

    @property
    def is_summary(self) -> bool:
        """Whether it stands in the place of earlier turns."""
        return self.user == SUMMARY_REQUEST


@dataclass(frozen=True, slots=True)
class Conversation:
    """The same messages of the user to one model or several (`side` 0, 1, ...), each of which sees its own answers.

    `told` is in force from the next turn on.
    """

    system: str = ""
    instruction: StandingInstruction = NO_INSTRUCTION
    turns: tuple[Turn, ...] = ()

    def messages(self, side: int, user: str | None = None) -> tuple[Message, ...]:
        """What a model sees, up to the next message `user`, if one is given; an instruction stands where it is first said."""
        told = [turn.instruction.text for turn in self.turns]
        users = [turn.user for turn in self.turns]
        if user is not None:
            users.append(user)
            told.append(self.instruction.text)
        return ghost(users, [turn.answers[side] for turn in self.turns], _worded(told), self.system)

    def with_turn(self, user: str, answers: Sequence[str]) -> Conversation:
        """With one more turn."""
        return replace(self, turns=(*self.turns, Turn(user, self.instruction, tuple(answers))))

    def before(self, turn: int) -> Conversation:
        """As it was before `turn` (from 1), with the instruction that was in force in it."""
        return replace(
            self, turns=self.turns[: turn - 1], instruction=self.turns[turn - 1].instruction
        )

    def without_last_turn(self) -> Conversation:
        """Without its last turn; an instruction given since then stays."""
        return replace(self, turns=self.turns[:-1])

    def without_instruction(self) -> Conversation:
        """Only what the user said and what was answered."""
        return Conversation(
            turns=tuple(
                replace(turn, instruction=NO_INSTRUCTION)
                for turn in self.turns
                if not turn.is_summary
            )
        )

    def middle(self, last: int) -> tuple[Turn, ...]:
        """The turns that a summary could replace: all but the first, those that change the instruction, and the `last`."""
        return tuple(self.turns[n] for n in self._middle(last))

    def summary_prompt(self, last: int, side: int) -> tuple[Message, ...]:
        """The chat that asks a model for that summary."""
        middle = self.middle(last)
        return ghost(
            [*(t.user for t in middle), SUMMARY_REQUEST],
            [t.answers[side] for t in middle],
            [""] * (len(middle) + 1),
            "",
        )

    def with_summaries(self, last: int, summaries: Sequence[str]) -> Conversation:
        """With each model's summary in the place of the middle."""
        dropped = self._middle(last)
        kept = [turn for n, turn in enumerate(self.turns) if n not in dropped]
        place = max(1, len(kept) - last)
        return replace(
            self,
            turns=(
                *kept[:place],
                Turn(SUMMARY_REQUEST, kept[place - 1].instruction, tuple(summaries)),
                *kept[place:],
            ),
        )

    def _middle(self, last: int) -> list[int]:
        changes = {
            n
            for n, (one, then) in enumerate(pairwise(self.turns), 1)
            if one.instruction != then.instruction
        }
        return [n for n in range(1, len(self.turns) - last) if n not in changes]

    def marks(self, side: int) -> list[Mark]:
        """Of every answer to a turn whose instruction can be checked."""
        found = (self.verdict(side, turn)[0] for turn in range(1, len(self.turns) + 1))
        return [mark for mark in found if mark]

    def verdict(self, side: int, turn: int) -> tuple[Mark | None, str]:
        """The mark of the answer of `turn` (from 1) and what makes it no answer; no mark where nothing can be checked."""
        at = self.turns[turn - 1]
        if not at.instruction.constraints or at.is_summary:
            return None, ""
        text, earlier = at.answers[side], [t.answers[side] for t in self.turns[: turn - 1]]
        wrong = find_defect(text, earlier, " ".join(c.value for c in at.instruction.constraints))
        kept = obeys(at.instruction.constraints, text)
        return ("~" if wrong else "✓") if kept else "✗", wrong


def tally(marks: Sequence[Mark]) -> str:
    """ "kept 2 of 3: ✓✗✓"; "" where there is nothing to count."""
    return f"kept {marks.count('✓')} of {len(marks)}: {''.join(marks)}" if marks else ""


def parse_conversation(
    sides: Sequence[Sequence[Message]], told: StandingInstruction
) -> Conversation:
    """The chat that has these messages on each side (a system message at most, then the user's, which are the same, and
    answers by turns), to go on with it under `told`, if that has a text.

    An instruction is told from the user's words where it is `told` or its wording is known; else it stays part of them.
    """
    system = next((m["content"] for m in sides[0] if m["role"] == "system"), "")
    users = [m["content"] for m in sides[0] if m["role"] == "user"]
    answers = zip(
        *([m["content"] for m in side if m["role"] == "assistant"] for side in sides), strict=True
    )
    plain = split = Conversation(system)
    for user, answer in zip(users, answers, strict=True):
        plain = plain.with_turn(user, answer)
        words, new = _split(user, told)
        split = replace(split, instruction=new or split.instruction).with_turn(words, answer)
    found = split if split.messages(0) == tuple(sides[0]) else plain
    return replace(found, instruction=told) if told.text else found


def _split(user: str, told: StandingInstruction) -> tuple[str, StandingInstruction | None]:
    """A message of the user, and the instruction behind it, where one is."""
    for known in ("", CHANGE_PREFIX):
        if told.text and user.endswith(ending := with_instruction(f"{known}{told.text}", "")):
            return user.removesuffix(ending), told
    words, _, behind = user.rpartition("\n\n")
    text = behind.removeprefix(CHANGE_PREFIX)
    constraints = parse_instruction(text)
    return (
        (words, StandingInstruction(text, constraints)) if words and constraints else (user, None)
    )


def _worded(told: Sequence[str]) -> list[str]:
    """What each turn is told, in the words in which it is said first."""
    worded = list(told[:1])
    for one, then in pairwise(told):
        worded.append(worded[-1] if one == then else f"{CHANGE_PREFIX}{then}" if then else "")
    return worded
