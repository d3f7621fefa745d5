"""What the parts exchange: messages, dialogues, instructions, requests, answers.

Plain, frozen values that turn into JSON and back, without imports from the project.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

Role = Literal["system", "user", "assistant"]
SynthesisMethod = Literal["sampled", "edited", "plain"]
"""How answers are made to obey: sampled until a check passes, edited, or not at all ("plain")."""

FinishReason = Literal["stop", "stop_when", "length", "context", "cancelled", "thinking"]
"""Why an answer ended.

"stop": the model ended its turn. "stop_when": the request's function. "length": `max_tokens`.
"context": the prompt does not fit. "cancelled": by the user of a chat. "thinking": within a
thought, so that there is no answer.
"""

MAX_THOUGHT_TOKENS = 2048
"""Tokens that a reasoning model may think for one answer, if nothing else is set."""
_NAME_LENGTH = 40
"""Characters of the name of an instruction in the user's own words."""
OMIT_EMPTY = {"omit_empty": True}
"""Metadata of a field that a line of a log leaves out while it is empty."""


class Message(TypedDict):
    """One message of a chat, as chat templates and `datasets` take it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The user's side of a conversation: `turns[k]` is the user message of turn k + 1."""

    id: str
    topic: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A verifiable requirement on every answer: a kind of the registry, and its value."""

    kind: str
    value: str = ""

    @property
    def name(self) -> str:
        """Return the constraint as tables show it: "opening: Ahoy!"."""
        return f"{self.kind}: {self.value}" if self.value else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomInstruction:
    """An instruction in the user's own words.

    `short` is a shortened wording, or "". `checks` say what is checked of the answers; without any,
    nothing is. `place` is where the instruction is given: in the first message, or in the system
    message. `label` is its name in tables; "" is the beginning of the text.
    """

    text: str
    short: str = ""
    checks: tuple[Constraint, ...] = ()
    place: Literal["first", "system"] = "first"
    label: str = ""

    @property
    def name(self) -> str:
        """Return the instruction as tables show it."""
        if self.label:
            return self.label
        line = " ".join(self.text.split())
        return line if len(line) <= _NAME_LENGTH else f"{line[: _NAME_LENGTH - 3].rstrip()}..."


@dataclass(frozen=True, slots=True)
class RecallQuestion:
    """A question about an attribute that turn 1 has set; a correct answer mentions `value`."""

    attribute: str
    question: str
    value: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the user asks for in turn 1 and expects of every answer (paper, section 3.3).

    `text` is the full wording, `short` the shortened one ("Figure: Napoleon."). Answers have to
    meet the `constraints`; `recall_questions` test later what is remembered. An instruction that
    only ends another one has no `text`: nothing is expected from there on, and `short` says so.
    One in the user's own words has a `label`, its name in tables.
    """

    text: str
    short: str
    constraints: tuple[Constraint, ...]
    recall_questions: tuple[RecallQuestion, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Return the instruction as tables show it: "opening: Ahoy!, bold", "name and hobby"."""
        if self.label:
            return self.label
        if not self.text:
            return "stop"
        attributes = " and ".join(question.attribute for question in self.recall_questions)
        return ", ".join(c.name for c in self.constraints) or attributes or self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One candidate for an answer in synthesis; turns and candidates are counted from 0.

    `raw` is what the teacher answered, `text` the same after editing. `verdict` is "accepted",
    or why it was not. `thoughts` are those of a reasoning teacher; they are not used.
    """

    dialogue: str
    turn: int
    candidate: int
    raw: str
    text: str
    tokens: int
    verdict: str
    thoughts: str = field(default="", metadata=OMIT_EMPTY)


class SynthesizedDialogue(TypedDict):
    """A row of `dialogues.jsonl`: the ghosted chat, and where it came from.

    `asked` is the chat as the teacher had it, `way` the method. `verdicts` are those on all
    candidates of each turn; the last candidate was accepted.
    """

    messages: Sequence[Message]
    asked: Sequence[Message]
    dialogue: str
    instruction: str
    way: SynthesisMethod
    teacher: str
    seed: int
    verdicts: list[list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer of an evaluated model; turns are counted from 1.

    `obeys` is the result of the instruction's check; None if it has none, or there is no
    instruction. `defect` is "", or why the reply is not a valid answer (a loop, a repeat, empty).
    `recall_attribute` is the attribute that a recall question asked for instead of the turn's own
    message, or "". `thoughts` are those of a reasoning model; they are not scored. `request` tells
    requests apart: equal ones to the same model have the same, "" none.
    """

    arm: str
    dialogue: str
    turn: int
    text: str
    prompt_tokens: int
    tokens: int
    finish: FinishReason
    obeys: bool | None
    defect: str
    recall_attribute: str = ""
    thoughts: str = field(default="", metadata=OMIT_EMPTY)
    request: str = field(default="", metadata=OMIT_EMPTY)

    @property
    def adherent(self) -> bool:
        """Return whether the reply obeys and has no defect."""
        return bool(self.obeys) and not self.defect


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """How tokens are drawn, besides temperature and top-p, under llama.cpp's names.

    `top_k` 0 keeps all tokens. `dry_multiplier` None is 0.8, and 0 at temperature 0.
    `repeat_penalty` counts the last `repeat_last_n` tokens of prompt and answer (-1: all); presence
    and frequency penalties count those of the answer. `logit_bias` has pairs of token id and bias.
    `ignore_eos` bans the tokens that end an answer. `grammar` is GBNF text with a rule `root`.
    `logprobs` is the number of most likely tokens that are reported with each token's
    log-probability; None reports nothing.
    """

    top_k: int = 40
    typical_p: float = 1.0
    min_p: float = 0.05
    dry_multiplier: float | None = None
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    grammar: str = ""
    logprobs: int | None = None


DEFAULT_SAMPLER = SamplerSettings()

SamplerName = Literal["plain", "greedy", "gatt"]
"""A name of `SAMPLERS`."""


class SamplerChoice(NamedTuple):
    """How tokens are drawn: the fields of a `Request`, under llama.cpp's names."""

    temperature: float
    top_p: float
    settings: SamplerSettings

    @property
    def values(self) -> dict[str, float]:
        """Return the values by llama.cpp's names; a DRY multiplier of 0 switches it off."""
        settings = self.settings
        dry = 0.8 if settings.dry_multiplier is None else settings.dry_multiplier
        return {
            "temperature": self.temperature,
            "top_k": settings.top_k,
            "top_p": self.top_p,
            "min_p": settings.min_p,
            "dry_multiplier": dry,
        }


SAMPLERS: dict[SamplerName, SamplerChoice] = {
    "plain": SamplerChoice(0.8, 0.95, SamplerSettings(top_k=40, min_p=0.05, dry_multiplier=0.0)),
    "greedy": SamplerChoice(0.0, 1.0, SamplerSettings(top_k=0, min_p=0.0, dry_multiplier=0.0)),
    "gatt": SamplerChoice(0.7, 1.0, DEFAULT_SAMPLER),
}
"""The default of most programs, greedy decoding, and that of `gatt evaluate` (with DRY)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for the assistant message that follows `messages`.

    Equal requests get equal completions. Generation stops as soon as `stop_when` is true of the
    answer so far. The thoughts of a reasoning model are no part of the answer; for them it gets
    `max_thought_tokens` in addition to `max_tokens`.
    """

    messages: tuple[Message, ...]
    seed: int
    max_tokens: int
    temperature: float = 0.7
    stop_when: Callable[[str], bool] | None = None
    top_p: float = 1.0
    sampler: SamplerSettings = DEFAULT_SAMPLER
    max_thought_tokens: int = MAX_THOUGHT_TOKENS


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model generated, and why it stopped.

    `text` is the answer, `thoughts` what a reasoning model wrote before it; `tokens` are those of
    both.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish: FinishReason
    thoughts: str = ""


Task = Generator[Request, Completion, None]
"""A dialogue as an engine runs it: yields requests, receives completions, keeps its results."""
RunTasks = Callable[[Iterable[Task]], None]
"""Runs tasks to their end, in any order: `GenerationEngine.run`."""
