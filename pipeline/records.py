"""What the stages exchange: messages, dialogues, instructions, answers.

Plain, frozen values that turn into JSON and back. No behavior beyond that, and no import from the project.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]
SynthesisMethod = Literal["sampled", "edited", "plain"]
"""How an answer came to obey: drawn until its check passed, edited so that it does, or no instruction at all."""


class Message(TypedDict):
    """One message of a chat, in the form that chat templates and `datasets` take."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The user's side of one conversation: `turns[k]` is what the user says in turn k + 1."""

    id: str
    topic: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One thing that every answer must show: a kind of `gatt.kinds.KINDS` and its value ("opening", "Ahoy!")."""

    kind: str
    value: str = ""

    @property
    def name(self) -> str:
        """The constraint as tables show it."""
        return f"{self.kind}: {self.value}" if self.value else self.kind


@dataclass(frozen=True, slots=True)
class RecallQuestion:
    """A question about what message 1 has set: a good answer to "What is your name?" has the value "Napoleon" in it."""

    attribute: str
    question: str
    value: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the user asks for in message 1 and expects to hold to the end (paper, section 3.3).

    `text` is the full wording; `short` the shortened one ("Figure: Napoleon."), which the paper puts in its place half
    of the time. Every answer is to show the `constraints`; the `asks` are put later, to see what is still known.
    """

    id: str
    text: str
    short: str
    constraints: tuple[Constraint, ...]
    recall_questions: tuple[RecallQuestion, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignment:
    """A dialogue with the instruction that it is to keep, and the way to an obedient answer.

    `instruction` is None for a plain dialogue, from which the model learns not to invent one. `shortened` says that
    the training data show `Instruction.short`, `in_system` that it stands in the system message. From turn `change`
    (counted from 0) on, the instruction `then` takes its place, if there is one.
    """

    dialogue: str
    instruction: str | None
    method: SynthesisMethod
    shortened: bool = False
    in_system: bool = False
    next_instruction: str | None = None
    change_turn: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One candidate for an assistant message in synthesis, accepted or not.

    `raw` is what the teacher said, `text` the same after editing. `verdict` is "accepted", or why it was not.
    """

    dialogue: str
    turn: int
    candidate: int
    raw: str
    text: str
    tokens: int
    verdict: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One assistant message of an evaluated model. `finish` is "stop", "length" (of the answer) or "context".

    `obeys` is the instruction's own check. `flaw` names what makes the reply no reply at all (a loop, a repeat, empty),
    or is "". A reply is *adherent* when it obeys and has no flaw. `probe` names the attribute that was asked for in place
    of the turn's own message; "" in the dialogue itself.
    """

    arm: str
    dialogue: str
    turn: int
    text: str
    prompt_tokens: int
    tokens: int
    finish: str
    obeys: bool
    defect: str
    probe: str = ""

    @property
    def adherent(self) -> bool:
        """Obeys the instruction, and is a reply."""
        return self.obeys and not self.defect


@dataclass(frozen=True, slots=True)
class Request:
    """Ask a model for the next assistant message after `messages`. Equal requests get equal completions.

    The answer is cut off as soon as `enough` holds of its text: what would follow is not wanted.
    """

    messages: tuple[Message, ...]
    seed: int
    max_tokens: int
    temperature: float = 0.7
    stop_when: Callable[[str], bool] | None = None
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model said, and why it stopped: "stop" (its own end), "enough", "length" (`max_tokens`) or "context"."""

    text: str
    tokens: int
    prompt_tokens: int
    finish: str


Task = Generator[Request, Completion, None]
"""A dialogue as an engine drives it: yields requests, receives completions, keeps its own results."""
