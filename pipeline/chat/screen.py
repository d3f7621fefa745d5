"""What a chat in a terminal needs of its screen, and the plain screen for pipes and files."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pipeline.console import log, print_result
from pipeline.errors import GattError

ShowText = Callable[[int, str], None]
"""Shows the next piece of the answer of the model with this index."""


class Screen(Protocol):
    """Where a chat is read and shown."""

    @property
    def interactive(self) -> bool:
        """Whether a user is there to choose, and to try again after a mistake."""

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
    """Reads a message per line from stdin; prints answers to stdout and remarks to stderr.

    An empty line ends the chat.
    """

    interactive = False

    async def read_message(self, status: str, draft: str = "") -> str:
        """Return the next line.

        Raises:
            EOFError: the line is empty, or there is none.
        """
        line = _read_line()
        if not line:
            raise EOFError
        return line

    async def edit(self, status: str, text: str) -> str:
        """Return the next line."""
        return _read_line()

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

        def show(model_index: int, piece: str) -> None:
            texts[model_index] += piece
            if len(names) == 1:
                print_result(piece, end="")

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


def _read_line() -> str:
    # asyncio's handler would only cancel the task, which waits here for a line that may not come.
    with on_interrupt(_raise_interrupt):
        return sys.stdin.readline().strip()


def _raise_interrupt() -> None:
    raise KeyboardInterrupt
