"""A chat without a model or a terminal: a scripted engine, and a scripted screen."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.chat.backend import LocalBackend
from pipeline.chat.commands import chat_loop
from pipeline.chat.conversation import Conversation, StandingInstruction
from pipeline.chat.screen import ShowText
from pipeline.chat.session import ChatSession, SamplingParams
from pipeline.chat.terminal import TerminalChat
from pipeline.gatt.instructions import render_instruction
from pipeline.inference.chat_engine import AnswerPiece, ChatEngine
from pipeline.inference.request import TextPiece
from pipeline.records import Completion, Constraint, FinishReason, Message, Request

AHOY = Constraint("opening", "Ahoy!")
BYE = Constraint("closing", "Bye.")
BEGIN_WITH_AHOY, END_WITH_BYE = (
    StandingInstruction(render_instruction((constraint,)).text, (constraint,))
    for constraint in (AHOY, BYE)
)
SAMPLING = SamplingParams(0.7, 12, 1)
MODEL_CONTEXT = 1024
"""The largest context of the chats that `open_chat` opens."""


def conversation(
    *turns: tuple[str, str],
    instruction: StandingInstruction = BEGIN_WITH_AHOY,
    system: str = "",
) -> Conversation:
    """Return a conversation with one model, of (user, answer) turns under one instruction."""
    result = Conversation(system, instruction)
    for user, answer in turns:
        result = result.with_turn(user, (answer,))
    return result


def answer_with_seed(request: Request) -> str:
    """Return an answer that follows `BEGIN_WITH_AHOY` and depends on the prompt and the seed."""
    return f"Ahoy! {request.messages[-1]['content'].split()[0]} in draw {request.seed}."


class ScriptedEngine(ChatEngine):
    """A chat engine without models; a token is a word.

    `answer` gives the answer to each of the `requests`, and `finish` is why all of them ended.
    """

    def __init__(
        self,
        answer: Callable[[Request], str] = answer_with_seed,
        context: int = 512,
        finish: FinishReason = "stop",
    ) -> None:
        self.context = context
        self.requests: list[Request] = []
        self._answer, self._finish = answer, finish

    def resized(self, context: int) -> ChatEngine:
        """Change the context."""
        self.context = context
        return self

    def close(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def count_tokens(
        self, model_index: int, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> int:
        """Return the number of words."""
        return sum(len(message["content"].split()) for message in messages)

    def generate(self, requests: Sequence[Request]) -> Iterator[AnswerPiece]:
        """Yield the answers word by word."""
        for index, request in enumerate(requests):
            self.requests.append(request)
            text = self._answer(request)
            pieces = re.findall(r"\S+\s*", text)
            for piece in pieces:
                yield AnswerPiece(index, TextPiece(piece))
            yield AnswerPiece(index, Completion(text, len(pieces), 0, self._finish))


@dataclass
class ScriptedScreen:
    """A screen on which everything was typed beforehand; it records what it shows.

    `lines` are the messages and edits, `choices` the answers to questions.
    """

    lines: Sequence[str]
    choices: Sequence[str] = ()
    interactive: bool = True
    usage: str = ""
    shown: list[str] = field(default_factory=list)
    drafts: list[str] = field(default_factory=list)
    offers: list[list[str]] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lines, self._choices = iter(self.lines), iter(self.choices)

    async def read_message(self, status: str, draft: str = "") -> str:
        """Return the next line."""
        self.statuses.append(status)
        self.drafts.append(draft)
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    async def edit(self, status: str, text: str) -> str:
        """Return the next line."""
        self.drafts.append(text)
        return next(self._lines)

    async def choose(self, question: str, options: Mapping[str, str]) -> str:
        """Return the next choice."""
        self.shown.append(question)
        self.offers.append(list(options))
        return next(self._choices)

    @contextmanager
    def stream(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[ShowText]:
        """Show nothing but the last status."""
        yield lambda model_index, piece: None
        self.statuses.append(status())

    def annotate(self, names: Sequence[str], notes: Sequence[str]) -> None:
        """Record the notes."""
        self.shown += notes

    def info(self, text: str) -> None:
        """Record a remark."""
        self.shown.append(text)

    def warn(self, text: str) -> None:
        """Record a warning."""
        self.shown.append(text)

    def print_table(self, rows: Mapping[str, str]) -> None:
        """Record the terms."""
        self.shown += rows


def open_chat(
    engine: ChatEngine,
    screen: ScriptedScreen,
    start: Conversation | None = None,
    sampling: SamplingParams = SAMPLING,
    names: Sequence[str] = ("model",),
) -> TerminalChat:
    """Return a chat on `screen`, by default under `BEGIN_WITH_AHOY`."""
    backend = LocalBackend(engine, names, MODEL_CONTEXT)
    session = ChatSession(backend, start or Conversation("", BEGIN_WITH_AHOY), sampling)
    return TerminalChat(screen, session, backend)


def run_chat(
    engine: ChatEngine,
    screen: ScriptedScreen,
    start: Conversation | None = None,
    sampling: SamplingParams = SAMPLING,
) -> Conversation:
    """Run a chat until nothing is typed any more, and return the conversation."""
    chat = open_chat(engine, screen, start, sampling)
    try:
        asyncio.run(chat_loop(chat))
    finally:
        chat.backend.close()
    return chat.session.conversation
