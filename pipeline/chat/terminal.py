"""A chat session in a terminal: sends messages, shows answers, and makes room in the context."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console

from pipeline.chat.backend import LocalBackend
from pipeline.chat.conversation import LAST_TURNS
from pipeline.chat.rich_screen import RichScreen
from pipeline.chat.screen import PlainScreen, Screen, as_message
from pipeline.chat.session import ChatSession, OnText, Room, cut_note, pluralize, tally
from pipeline.console import log
from pipeline.errors import GattError
from pipeline.inference.request import TextPiece
from pipeline.records import Completion

_Result = TypeVar("_Result")


def open_screen(history: Path, *, lines: bool) -> Screen:
    """Return a rich screen on a terminal, with its input history in a file, or a plain screen.

    What is typed there comes in lines; what is piped does with `lines`, or else as one message.
    """
    console = Console(highlight=False)
    if sys.stdin.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return RichScreen(console, _open_history(history))
    return PlainScreen(lines=lines or sys.stdin.isatty())


def _open_history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        log(f"The input history is not saved: cannot write {path} ({error.strerror}).")
        return InMemoryHistory()
    return FileHistory(str(path))


class TerminalChat:
    """A session with the models of `backend` on a `screen`."""

    def __init__(self, screen: Screen, session: ChatSession, backend: LocalBackend) -> None:
        self.screen, self.session, self.backend = screen, session, backend
        self.draft = ""
        """What the user typed and was not sent, as `chat_loop` reads it."""
        self.saved = session.conversation
        self._speed = ""

    @property
    def is_unsaved(self) -> bool:
        """Whether the conversation has turns that no file holds."""
        conversation = self.session.conversation
        return bool(conversation.turns) and conversation is not self.saved

    async def send(self, user: str) -> None:
        """Send a message and show the answers.

        Raises:
            GattError: there is no room and nobody to choose what to do, or no answer. The
                conversation is unchanged.
        """
        self.draft = as_message(user)  # to be sent again, should anything go wrong
        if not await self._make_room(user):
            return
        max_tokens = self.session.sampling.max_tokens
        completions = await self.stream(
            lambda on_text: self.session.turn(user, max_tokens, on_text)
        )
        self.draft = ""
        self._annotate(completions)

    async def stream(self, generate: Callable[[OnText], Awaitable[_Result]]) -> _Result:
        """Show answers while `generate` produces them, and return its result."""
        names = self.session.backend.names
        meter = _SpeedMeter(len(names))

        def status() -> str:
            turn = len(self.session.conversation.turns) + 1
            return f"turn {turn} · {meter} · Ctrl-C stops the answer"

        with self.screen.stream(names, status, self.session.stop) as show:

            def on_text(model_index: int, piece: TextPiece) -> None:
                show(model_index, piece)
                meter.count(model_index)

            result = await generate(on_text)
        self._speed = str(meter)
        return result

    async def status(self) -> str:
        """Return the turn, the used context, and the speed of the last answer."""
        context = self.backend.context
        try:
            used = await self.session.tokens_used()
            usage = f"context {used} of {context}, {context - used} left"
        except GattError:  # the template refuses the chat: a message, not the status, says so
            usage = f"context of {context}"
        parts = [f"turn {len(self.session.conversation.turns) + 1}", usage, self._speed]
        return " · ".join(filter(None, parts))

    def resize(self, context: int) -> None:
        """Continue with a context of `context` tokens.

        Raises:
            GattError: too little memory; the context is unchanged.
        """
        self.backend.resize(context)
        self.screen.info(f"The context is {context} tokens now.")

    def _annotate(self, completions: Sequence[Completion]) -> None:
        """Show whether the last answers follow the instruction, and what cut them off."""
        notes: list[str] = []
        for completion, verdicts in zip(completions, self.session.verdicts(), strict=True):
            mark, defect = verdicts[-1]
            marks = "".join(verdict.mark or "" for verdict in verdicts)
            parts = (
                f"{mark} followed {tally(verdicts)}: {marks}" if mark else "",
                f"follows the instruction, but is not a valid answer ({defect})"
                if mark == "~"
                else "",
                cut_note(completion, self.session.sampling.max_tokens),
            )
            notes.append(" · ".join(filter(None, parts)))
        if any(notes):
            self.screen.annotate(self.session.backend.names, notes)

    async def _make_room(self, user: str) -> bool:
        """Return whether the message and an answer fit, after what the user chooses.

        Nothing is dropped without the user's choice.
        """
        while not (room := await self.session.room_for(user)).fits:
            choice = await self.screen.choose(
                f"The context of {room.context} tokens is nearly full: {room.prompt_tokens} with "
                f"this message, and an answer may take {room.max_tokens}. Nothing has been "
                "dropped.",
                _room_options(room),
            )
            if choice == "q":
                return False
            try:
                if choice == "l":
                    self.resize(room.larger_context)
                else:
                    await self._summarize(room.summarizable_turns)
            except GattError as error:
                self.screen.warn(str(error))
        return True

    async def _summarize(self, turn_count: int) -> None:
        summaries = await self.stream(self.session.summarize)
        options = {
            "y": f"replace {pluralize(turn_count, 'turn')} with it",
            "n": "change nothing",
        }
        if await self.screen.choose("Is this summary good enough?", options) == "y":
            self.session.replace_middle(summaries)


def _room_options(room: Room) -> dict[str, str]:
    options: dict[str, str] = {}
    if room.larger_context:
        options["l"] = f"a larger context, of {room.larger_context} tokens"
    if room.summarizable_turns:
        options["s"] = (
            f"a summary in place of {pluralize(room.summarizable_turns, 'turn')}; turn 1 and the "
            f"last {LAST_TURNS} remain word for word"
        )
    options["q"] = "stop: nothing is sent, and the chat is unchanged"
    return options


class _SpeedMeter:
    """Tokens per second of each model, from its first token on; `str` is what the status shows."""

    def __init__(self, model_count: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(model_count)]

    def count(self, model_index: int) -> None:
        """Count a token."""
        self._times[model_index].append(time.monotonic())

    def __str__(self) -> str:
        rates = [
            (len(times) - 1) / (times[-1] - times[0])
            for times in self._times
            if times and times[-1] > times[0]
        ]
        if not rates:
            return "reading"
        texts = [f"{rate:.2g}" if rate < 10 else f"{rate:.0f}" for rate in rates]
        return f"{' and '.join(texts)} tokens/s"
