"""A conversation as an immutable value: messages, instructions, answers, and their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from pipeline.gatt.constraints.registry import is_judged, obeys, required_words
from pipeline.gatt.ghost import CHANGE_PREFIX, ghost, with_instruction
from pipeline.gatt.instructions import parse_instruction
from pipeline.gatt.quality import find_defect
from pipeline.records import Constraint, Message

SUMMARY_REQUEST = "Sum up in a few sentences what we have talked about so far."
"""The user's message of the turn that holds a summary of earlier turns."""

LAST_TURNS = 3
"""Turns at the end that a summary never replaces."""
SUMMARY_TOKENS = 160
"""Maximum tokens of a summary."""

Mark = Literal["✓", "✗", "~"]
"""An answer follows its instruction; does not; or follows it and has a defect (a loop, ...)."""


class Verdict(NamedTuple):
    """Whether an answer follows its instruction.

    `mark` is None if no program can check it. `defect` names what makes the answer invalid, or "".
    """

    mark: Mark | None
    defect: str = ""


class StandingInstruction(NamedTuple):
    """An instruction in the user's words ("" for none), and the constraints that check it."""

    text: str = ""
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def parse(cls, text: str) -> StandingInstruction:
        """Return the instruction `text` with the constraints that its wording is known to mean."""
        return cls(text.strip(), parse_instruction(text))


NO_INSTRUCTION = StandingInstruction()


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message without the instruction, the active instruction, and each model's answer."""

    user: str
    instruction: StandingInstruction
    answers: tuple[str, ...]

    @property
    def is_summary(self) -> bool:
        """Whether the turn replaces earlier turns with their summary."""
        return self.user == SUMMARY_REQUEST


@dataclass(frozen=True, slots=True)
class Conversation:
    """The same user messages to one model or several, each of which sees its own answers.

    Models are addressed by index (`model_index` 0, 1, ...), turns by number from 1. `instruction`
    is active from the next turn on.
    """

    system: str = ""
    instruction: StandingInstruction = NO_INSTRUCTION
    turns: tuple[Turn, ...] = ()

    def messages(self, model_index: int, user: str | None = None) -> tuple[Message, ...]:
        """Return the chat as a model sees it, followed by the message `user`, if given.

        Each instruction appears once: in the turn from which it is active.
        """
        instructions = [turn.instruction.text for turn in self.turns]
        users = [turn.user for turn in self.turns]
        if user is not None:
            users.append(user)
            instructions.append(self.instruction.text)
        answers = [turn.answers[model_index] for turn in self.turns]
        return ghost(users, answers, _worded(instructions), self.system)

    def with_turn(
        self, user: str, answers: Sequence[str], instruction: StandingInstruction | None = None
    ) -> Conversation:
        """Return the conversation with another turn, under the present instruction by default."""
        turn = Turn(user, self.instruction if instruction is None else instruction, tuple(answers))
        return replace(self, turns=(*self.turns, turn))

    def before(self, number: int) -> Conversation:
        """Return the conversation before turn `number`, under that turn's instruction."""
        turn = self.turns[number - 1]
        return replace(self, turns=self.turns[: number - 1], instruction=turn.instruction)

    def without_last_turn(self) -> Conversation:
        """Return the conversation without the last turn, under the present instruction."""
        return replace(self, turns=self.turns[:-1])

    def without_instruction(self) -> Conversation:
        """Return the messages and answers only: no system message, instruction or summary."""
        turns = [turn for turn in self.turns if not turn.is_summary]
        return Conversation(
            turns=tuple(replace(turn, instruction=NO_INSTRUCTION) for turn in turns)
        )

    def middle(self, last: int) -> tuple[Turn, ...]:
        """Return the turns that a summary could replace.

        These are all but the first, those that change the instruction, and the `last`.
        """
        return tuple(self.turns[index] for index in self._middle_indices(last))

    def summary_prompt(self, last: int, model_index: int) -> tuple[Message, ...]:
        """Return the chat that asks a model to summarize its `middle`."""
        middle = self.middle(last)
        users = [*(turn.user for turn in middle), SUMMARY_REQUEST]
        answers = [turn.answers[model_index] for turn in middle]
        return ghost(users, answers, [""] * len(users), "")

    def with_summaries(self, last: int, summaries: Sequence[str]) -> Conversation:
        """Return the conversation with each model's summary in place of the `middle`."""
        dropped = self._middle_indices(last)
        turns = [turn for index, turn in enumerate(self.turns) if index not in dropped]
        start = max(1, len(turns) - last)
        summary = Turn(SUMMARY_REQUEST, turns[start - 1].instruction, tuple(summaries))
        return replace(self, turns=(*turns[:start], summary, *turns[start:]))

    def _middle_indices(self, last: int) -> list[int]:
        instructions = [turn.instruction for turn in self.turns]
        changes = {
            index
            for index, (previous, current) in enumerate(pairwise(instructions), 1)
            if previous != current
        }
        return [index for index in range(1, len(self.turns) - last) if index not in changes]

    def verdict(self, model_index: int, number: int) -> Verdict:
        """Return the verdict on a model's answer in turn `number`, given its earlier answers."""
        turn = self.turns[number - 1]
        constraints = turn.instruction.constraints
        if not constraints or turn.is_summary or is_judged(constraints):
            return Verdict(None)
        text = turn.answers[model_index]
        earlier = [previous.answers[model_index] for previous in self.turns[: number - 1]]
        defect = find_defect(text, earlier, required_words(constraints))
        dialogue = self.before(number).messages(model_index, turn.user)
        if not obeys(constraints, text, dialogue):
            return Verdict("✗", defect)
        return Verdict("~" if defect else "✓", defect)


def parse_conversation(
    chats: Sequence[Sequence[Message]], instruction: StandingInstruction
) -> Conversation:
    """Return the conversation of `chats`, one for each model, to continue it.

    The chats have the same user messages. Each is an optional system message, then messages of
    user and assistant by turns. `instruction` becomes the active one if it has a text.

    Instructions are separated from the user's messages if they are `instruction` or their wording
    is known. They remain part of the messages if the chat could not be rendered identically.
    """
    conversation = _parse(chats, lambda user: _split(user, instruction))
    if conversation.messages(0) != tuple(chats[0]):
        conversation = _parse(chats, lambda user: (user, None))
    return replace(conversation, instruction=instruction) if instruction.text else conversation


def _parse(
    chats: Sequence[Sequence[Message]],
    split: Callable[[str], tuple[str, StandingInstruction | None]],
) -> Conversation:
    users = _contents(chats[0], "user")
    answers = zip(*(_contents(chat, "assistant") for chat in chats), strict=True)
    conversation = Conversation("".join(_contents(chats[0], "system")))
    for user, texts in zip(users, answers, strict=True):
        message, changed = split(user)
        instruction = changed or conversation.instruction
        conversation = replace(conversation, instruction=instruction).with_turn(message, texts)
    return conversation


def _contents(chat: Sequence[Message], role: str) -> list[str]:
    return [message["content"] for message in chat if message["role"] == role]


def _split(user: str, instruction: StandingInstruction) -> tuple[str, StandingInstruction | None]:
    """Return a user's message without the instruction at its end, and that instruction, if any."""
    for prefix in ("", CHANGE_PREFIX):
        ending = with_instruction(f"{prefix}{instruction.text}", "")
        if instruction.text and user.endswith(ending):
            return user.removesuffix(ending), instruction
    message, _, last_paragraph = user.rpartition("\n\n")
    text = last_paragraph.removeprefix(CHANGE_PREFIX)
    constraints = parse_instruction(text)
    if message and constraints:
        return message, StandingInstruction(text, constraints)
    return user, None


def _worded(instructions: Sequence[str]) -> list[str]:
    """Return each turn's instruction in the words in which it was given."""
    worded = list(instructions[:1])
    for previous, current in pairwise(instructions):
        if current == previous:
            worded.append(worded[-1])
        else:
            worded.append(f"{CHANGE_PREFIX}{current}" if current else "")
    return worded
