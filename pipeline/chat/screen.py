"""What a chat in a terminal needs of its screen, and the plain screen for pipes and files."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pipeline.console import log, print_result
from pipeline.errors import GattError
from pipeline.inference.request import TextPiece

ShowText = Callable[[int, TextPiece], None]
"""Shows the next piece of the answer of the model with this index."""


class Screen(Protocol):
    """Where a chat is read and shown."""

    @property
    def interactive(self) -> bool:
        """Whether a user is there to choose, and to try again after a mistake."""

    @property
    def usage(self) -> str:
        """How messages are given, in a sentence."""

    async def read_message(self, status: str, draft: str = "") -> str:
        """Return what the user types, perhaps in several lines, starting from `draft`.

        Raises:
            EOFError: the user leaves.
        """

    async def edit(self, status: str, text: str) -> str:
        """Return `text` as the user changes it, or "" to change nothing."""

    async def choose(self, question: str, options: Mapping[str, str]) -> str:
        """Return the chosen key of `options`, which maps keys to labels; the last changes nothing.

        Raises:
            GattError: nobody is there to choose.
        """

    def stream(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> AbstractContextManager[ShowText]:
        """Show answers while they are generated; Ctrl-C calls `stop`."""

    def annotate(self, names: Sequence[str], notes: Sequence[str]) -> None:
        """Show a note below each model's answer."""

    def info(self, text: str) -> None:
        """Show a remark."""

    def warn(self, text: str) -> None:
        """Show what went wrong."""

    def print_table(self, rows: Mapping[str, str]) -> None:
        """Show terms with their meanings."""


class PlainScreen:
    """Reads messages from stdin; prints answers to stdout and remarks to stderr.

    With `lines`, each line is a message or a command. Otherwise all of stdin is one message.
    """

    interactive = False

    def __init__(self, *, lines: bool) -> None:
        self._lines = lines
        self.usage = (
            "Each line is a message, or a command (/help)."
            if lines
            else "All of stdin is one message; --lines takes each line as one."
        )

    async def read_message(self, status: str, draft: str = "") -> str:
        """Return the next message.

        Raises:
            EOFError: there is none.
        """
        while text := _read(lines=self._lines):
            if text.strip():
                return text.strip() if self._lines else as_message(text.strip("\r\n"))
        raise EOFError

    async def edit(self, status: str, text: str) -> str:
        """Return the next line."""
        return _read(lines=True).strip()

    async def choose(self, question: str, options: Mapping[str, str]) -> str:
        """Refuse.

        Raises:
            GattError: always.
        """
        raise GattError(
            f"{question} On a terminal you could choose: {'; '.join(options.values())}."
        )

    @contextmanager
    def stream(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[ShowText]:
        """Print one model's answer while it is generated, or those of several at the end."""
        texts = [""] * len(names)
        interrupted = False

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            stop()

        def show(model_index: int, piece: TextPiece) -> None:
            texts[model_index] += piece.text
            if len(names) == 1:
                print_result(piece.text, end="")

        with on_interrupt(interrupt):
            yield show
        if interrupted:  # off a terminal, Ctrl-C ends the program
            raise KeyboardInterrupt
        if len(names) == 1:
            print_result("")
        else:
            for name, text in zip(names, texts, strict=True):
                print_result(f"[{name}]\n{text}")

    def annotate(self, names: Sequence[str], notes: Sequence[str]) -> None:
        """Print a note for each answer."""
        for name, note in zip(names, notes, strict=True):
            log(note if len(names) == 1 else f"{name}: {note}")

    def info(self, text: str) -> None:
        """Print a remark."""
        log(text)

    def warn(self, text: str) -> None:
        """Print what went wrong."""
        log(text)

    def print_table(self, rows: Mapping[str, str]) -> None:
        """Print terms with their meanings."""
        for term, meaning in rows.items():
            log(f"{term:24}{meaning}")


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` on Ctrl-C, which raises nothing by itself."""
    previous = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def as_message(text: str) -> str:
    """Return a text as `chat_loop` reads a message: one that begins with a slash is a command."""
    return f"/{text}" if text.startswith("/") else text


def _read(*, lines: bool) -> str:
    """Return the next line of stdin with its line break, or all of it; "" at the end."""
    # asyncio's handler would only cancel the task, which waits here for a line that may not come.
    with on_interrupt(_raise_interrupt):
        return sys.stdin.readline() if lines else sys.stdin.read()


def _raise_interrupt() -> None:
    raise KeyboardInterrupt
