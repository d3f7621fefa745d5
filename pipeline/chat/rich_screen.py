"""The chat on a terminal: a line editor with a history, and Markdown while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.rule import Rule
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.chat.screen import ShowText, on_interrupt
from pipeline.inference.request import TextPiece

_MIN_COLUMNS_SIDE_BY_SIDE = 100
_CONTROL_CHARACTERS = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}
"""Removed from text of a model or a file, which must not control the terminal."""
_MARK_COLORS = {"✓": "green", "✗": "red", "~": "yellow"}
_STATUS_LINES = 3


class RichScreen:
    """A terminal: `history` provides what the user typed before."""

    interactive = True
    usage = "/help lists the commands; Ctrl-D leaves."

    def __init__(self, console: Console, history: History) -> None:
        self._console = console
        style = Style.from_dict(
            {"bottom-toolbar": "noreverse ansibrightblack", "prompt": "ansicyan bold"}
        )
        self._message_prompt: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")],
            multiline=True,
            history=history,
            key_bindings=_key_bindings(),
            style=style,
            prompt_continuation=[("class:prompt", ". ")],
            reserve_space_for_menu=0,
        )
        # Without the history: a choice is not a message that the arrow keys bring back.
        self._choice_prompt: PromptSession[str] = PromptSession(
            [("class:prompt", "> ")], style=style, reserve_space_for_menu=0
        )

    async def read_message(self, status: str, draft: str = "") -> str:
        """Return what the user types, perhaps in several lines, starting from `draft`.

        Raises:
            EOFError: the user leaves.
        """
        while True:
            self._console.print()
            try:
                text = await self._message_prompt.prompt_async(default=draft, bottom_toolbar=status)
            except KeyboardInterrupt:
                self.info("Ctrl-D leaves the chat; /help lists the commands.")
                draft = ""
                continue
            if text.strip():
                return text.strip()

    async def edit(self, status: str, text: str) -> str:
        """Return `text` as the user changes it, or "" to change nothing."""
        try:
            edited = await self._message_prompt.prompt_async(default=text, bottom_toolbar=status)
        except (EOFError, KeyboardInterrupt):
            return ""
        return edited.strip()

    async def choose(self, question: str, options: Mapping[str, str]) -> str:
        """Return the chosen key of `options`; Ctrl-C and Ctrl-D choose the last one."""
        self.warn(question)
        self.print_table(options)
        keys = ", ".join(options)
        while True:
            try:
                answer = await self._choice_prompt.prompt_async(bottom_toolbar=f"one of {keys}")
            except (EOFError, KeyboardInterrupt):
                return list(options)[-1]
            key = answer.strip().lower()
            if key in options:
                return key
            self.warn(f"Unknown choice {key!r}; expected one of {keys}.")

    @contextmanager
    def stream(
        self, names: Sequence[str], status: Callable[[], str], stop: Callable[[], None]
    ) -> Iterator[ShowText]:
        """Show answers while they are generated; Ctrl-C calls `stop`."""
        answers = _StreamedAnswers(names, status)
        # Transient: only the last screenful can be redrawn. At the end all of it is printed once.
        with (
            on_interrupt(stop),
            _no_echo(),
            Live(answers, console=self._console, refresh_per_second=8, transient=True),
        ):
            yield answers.add
        self._console.print(answers.render(self._console.width))

    def annotate(self, names: Sequence[str], notes: Sequence[str]) -> None:
        """Show a note below each model's answer."""
        texts = [Text(note, "dim") for note in notes]
        for text, (mark, color) in product(texts, _MARK_COLORS.items()):
            text.highlight_regex(mark, f"not dim {color}")
        if len(names) == 1 or self._console.width >= _MIN_COLUMNS_SIDE_BY_SIDE:
            self._console.print(_columns(texts))
        else:
            for name, text in zip(names, texts, strict=True):
                self._console.print(Text.assemble((f"{name}: ", "dim"), text))

    def info(self, text: str) -> None:
        """Show a remark."""
        self._console.print(Text(text.translate(_CONTROL_CHARACTERS), "dim"))

    def warn(self, text: str) -> None:
        """Show what went wrong."""
        self._console.print(Text(text.translate(_CONTROL_CHARACTERS), "yellow"))

    def print_table(self, rows: Mapping[str, str]) -> None:
        """Show terms with their meanings."""
        table = Table.grid(padding=(0, 2))
        for term, meaning in rows.items():
            table.add_row(Text(term, "cyan"), Text(meaning, "dim"))
        self._console.print(table)


class _StreamedAnswers:
    """Answers that grow, as rich draws them: the last screenful, and the status."""

    def __init__(self, names: Sequence[str], status: Callable[[], str]) -> None:
        self._names, self._status = names, status
        self._texts = [""] * len(names)
        self._thoughts = [""] * len(names)

    def add(self, model_index: int, piece: TextPiece) -> None:
        """Append a piece of an answer, or of its thoughts."""
        self._texts[model_index] += piece.text.translate(_CONTROL_CHARACTERS)
        self._thoughts[model_index] += piece.thoughts.translate(_CONTROL_CHARACTERS)

    def render(self, width: int) -> RenderableType:
        """Return all answers, side by side if `width` columns are enough."""
        answers = list(map(_render, self._thoughts, self._texts))
        if len(answers) == 1:
            return Group("", answers[0])
        headings = [Rule(Text(name, "bold"), align="left", style="dim") for name in self._names]
        if width >= _MIN_COLUMNS_SIDE_BY_SIDE:
            return Group("", _columns(headings), _columns(answers))
        pairs = zip(headings, answers, strict=True)
        return Group(*(part for pair in pairs for part in ("", *pair)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the last lines that fit above the status, then the status."""
        answers = self.render(options.max_width)
        lines = console.render_lines(answers, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - _STATUS_LINES) :]:
            yield from line
            yield Segment.line()
        yield Text(self._status(), "bright_black", no_wrap=True, overflow="ellipsis")


def _render(thoughts: str, text: str) -> RenderableType:
    """Return an answer as Markdown, below its thoughts, which are dimmed."""
    answer = Markdown(_with_line_breaks(text)) if text else Text("…", "dim")
    return Group(Text(thoughts.strip(), "dim italic"), "", answer) if thoughts.strip() else answer


def _columns(parts: Sequence[RenderableType]) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in parts:
        table.add_column(ratio=1)
    table.add_row(*parts)
    return table


def _with_line_breaks(text: str) -> str:
    """Return Markdown that keeps the model's line breaks: the instruction may count lines."""
    in_code = False
    lines: list[str] = []
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        lines.append(line if in_code else f"{line}  ")
    return "\n".join(lines)


def _key_bindings() -> KeyBindings:
    """Return bindings: Enter sends; backslash Enter and Alt-Enter start a new line."""
    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


@contextmanager
def _no_echo() -> Iterator[None]:
    """Do not echo what is typed ahead into the answer; the next prompt shows it."""
    try:
        import termios
    except ImportError:  # Windows echoes only what a program reads
        yield
        return
    attributes = termios.tcgetattr(sys.stdin)
    silent = [*attributes]
    # NOFLSH: what was typed is not lost when Ctrl-C stops the answer.
    silent[3] = attributes[3] & ~termios.ECHO | termios.NOFLSH
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
