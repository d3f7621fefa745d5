"""How a chat is read and shown: on a terminal, or line by line elsewhere. With console.py the only place that prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.console import log, print_result
from pipeline.errors import GattError

_SIDE_BY_SIDE = 100
"""Columns from which on two answers stand beside each other."""
_CONTROL = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}
"""A model's words, or those of a file, must not steer the terminal."""

_MARKS = {"✓": "green", "✗": "red", "~": "yellow"}

Add = Callable[[int, str], None]
"""Shows a piece of the answer of a model, given by its number."""


class Screen(Protocol):
    """Where a chat takes place."""

    def ask(self, status: str, draft: str = "") -> str:
        """What the user says next, perhaps in several lines; `draft` is there to be changed.

        Raises:
            EOFError: the user leaves.
        """

    def change(self, status: str, text: str) -> str:
        """`text` as the user changes it; "" where nothing is to be changed."""

    def choose(self, question: str, options: Mapping[str, str]) -> str:
        """One of the `options` (a key each, and what it means), the last of which changes nothing.

        Raises:
            GattError: nobody is there to choose.
        """

    def answering(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> AbstractContextManager[Add]:
        """Show answers while they come; Ctrl-C calls `stop`."""

    def beside(self, names: Sequence[str], remarks: Sequence[str]) -> None:
        """A remark on each answer."""

    def say(self, text: str) -> None:
        """A remark."""

    def complain(self, text: str) -> None:
        """What went wrong."""

    def explain(self, rows: Mapping[str, str]) -> None:
        """What each of some words means."""

    @property
    def watched(self) -> bool:
        """Whether somebody is there, to try again after a mistake."""


def open_screen(history: Path) -> Screen:
    """A terminal where there is one; what was typed in it is kept in the file `history`."""
    console = Console(highlight=False)
    if sys.stdin.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return RichScreen(console, _history(history))
    return PlainScreen()


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        log(f"What you type is not kept for the next chat: cannot write {path} ({error.strerror}).")
        return InMemoryHistory()
    return FileHistory(str(path))


class PlainScreen:
    """Standard input, a message a line; answers to stdout, remarks to stderr. An empty line ends the chat."""

    watched = False

    def ask(self, status: str, draft: str = "") -> str:
        line = sys.stdin.readline().strip()
        if not line:
            raise EOFError
        return line

    def change(self, status: str, text: str) -> str:
        return sys.stdin.readline().strip()

    def choose(self, question: str, options: Mapping[str, str]) -> str:
        raise GattError(
            f"{question} On a terminal you could choose: {'; '.join(options.values())}."
        )

    @contextmanager
    def answering(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[Add]:
        if len(names) == 1:
            yield lambda side, piece: print_result(piece, end="")
            print_result("")
            return
        texts = [""] * len(names)
        yield lambda side, piece: texts.__setitem__(side, texts[side] + piece)
        for name, text in zip(names, texts, strict=True):
            print_result(f"[{name}]\n{text}")

    def beside(self, names: Sequence[str], remarks: Sequence[str]) -> None:
        for name, remark in zip(names, remarks, strict=True):
            log(remark if len(names) == 1 else f"{name}: {remark}")

    def say(self, text: str) -> None:
        log(text)

    complain = say

    def explain(self, rows: Mapping[str, str]) -> None:
        for word, meaning in rows.items():
            log(f"{word:24}{meaning}")


class RichScreen:
    """Markdown while it streams, a line editor with a history, the status below."""

    watched = True

    def __init__(self, console: Console, history: History) -> None:
        self._console = console
        style = Style.from_dict(
            {"bottom-toolbar": "noreverse ansibrightblack", "prompt": "ansicyan bold"}
        )
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            multiline=True,
            history=history,
            key_bindings=_keys(),
            style=style,
            prompt_continuation=[("class:prompt", ". ")],
            reserve_space_for_menu=0,
        )
        # What is chosen is no message, to be brought back by an arrow.
        self._choice: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")], style=style, reserve_space_for_menu=0
        )

    def ask(self, status: str, draft: str = "") -> str:
        while True:
            self._console.print()
            try:
                said = self._session.prompt(default=draft, bottom_toolbar=status).strip()
            except KeyboardInterrupt:
                self.say("Ctrl-D leaves the chat; /help lists what else there is.")
                draft = ""
                continue
            if said:
                return said

    def change(self, status: str, text: str) -> str:
        try:
            return self._session.prompt(default=text, bottom_toolbar=status).strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def choose(self, question: str, options: Mapping[str, str]) -> str:
        self.complain(question)
        self.explain(options)
        while True:
            try:
                said = (
                    self._choice.prompt(bottom_toolbar=f"one of {', '.join(options)}")
                    .strip()
                    .lower()
                )
            except (EOFError, KeyboardInterrupt):
                return list(options)[-1]
            if said in options:
                return said
            self.complain(f"{said!r} is none of {', '.join(options)}.")

    @contextmanager
    def answering(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[Add]:
        answers = _Answers(names, status)
        # Transient: while it streams only the last screenful can be redrawn, and then the whole is printed once.
        with (
            _interrupted(stop),
            _no_echo(),
            Live(answers, console=self._console, refresh_per_second=8, transient=True),
        ):
            yield answers.add
        self._console.print(answers.whole(self._console.width))

    def beside(self, names: Sequence[str], remarks: Sequence[str]) -> None:
        texts = [Text(remark, "dim") for remark in remarks]
        for text, (sign, color) in product(texts, _MARKS.items()):
            text.highlight_regex(sign, f"not dim {color}")
        if len(names) == 1 or self._console.width >= _SIDE_BY_SIDE:
            self._console.print(_columns(texts))
        else:
            for name, text in zip(names, texts, strict=True):
                self._console.print(Text.assemble((f"{name}: ", "dim"), text))

    def say(self, text: str) -> None:
        self._console.print(Text(text.translate(_CONTROL), "dim"))

    def complain(self, text: str) -> None:
        self._console.print(Text(text.translate(_CONTROL), "yellow"))

    def explain(self, rows: Mapping[str, str]) -> None:
        table = Table.grid(padding=(0, 2))
        for word, meaning in rows.items():
            table.add_row(Text(word, "cyan"), Text(meaning, "dim"))
        self._console.print(table)


class _Answers:
    """Answers that grow, as rich draws them: the last screenful, and the status."""

    def __init__(self, names: Sequence[str], status: Callable[[], str]) -> None:
        self._names, self._status = names, status
        self._texts = [""] * len(names)

    def add(self, side: int, piece: str) -> None:
        """A piece of an answer."""
        self._texts[side] += piece.translate(_CONTROL)

    def whole(self, width: int) -> RenderableType:
        """All answers: beside each other where there is room."""
        parts: list[RenderableType] = [
            Markdown(_broken(text)) if text else Text("…", "dim") for text in self._texts
        ]
        if len(parts) == 1:
            return Group("", parts[0])
        headings = [Rule(Text(name, "bold"), align="left", style="dim") for name in self._names]
        if width >= _SIDE_BY_SIDE:
            return Group("", _columns(headings), _columns(parts))
        return Group(*(part for pair in zip(headings, parts, strict=True) for part in ("", *pair)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines that fit above the status."""
        lines = console.render_lines(
            self.whole(options.max_width), options.update(height=None), pad=False
        )
        for line in lines[-max(1, console.height - 3) :]:
            yield from line
            yield Segment.line()
        yield Text(self._status(), "bright_black", no_wrap=True, overflow="ellipsis")


def _columns(parts: Sequence[RenderableType]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in parts:
        table.add_column(ratio=1)
    table.add_row(*parts)
    return table


def _broken(text: str) -> str:
    """Markdown that breaks lines where the model did: how many there are may be what was asked for."""
    fenced = False
    lines: list[str] = []
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        lines.append(line if fenced else f"{line}  ")
    return "\n".join(lines)


def _keys() -> KeyBindings:
    """Enter sends, unless a backslash stands before it; Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


@contextmanager
def _interrupted(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`, and raises nothing."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed ahead is not written into the answer; the next prompt shows it."""
    try:
        import termios
    except ImportError:  # Windows, which echoes only what a program reads
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO | termios.NOFLSH  # nor lost when Ctrl-C stops the answer
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
