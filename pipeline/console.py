"""The only module that prints. Results go to stdout; progress and remarks go to stderr."""

from __future__ import annotations

import codecs
import io
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.2
_LINES_OF_PACE = 18
"""The time left follows the pace of these last lines: results that are reused come in a burst."""
_NUMERIC = re.compile(r"[+-]?\d.*|-?")


class Progress:
    """A count toward `total` with the time left: a plain line on stderr every ten seconds."""

    _seconds_between = _SECONDS_BETWEEN_LINES

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done = label, total, done
        self._drawn = time.monotonic()
        self._drawings = deque([(self._drawn, done)], _LINES_OF_PACE)
        # Bound now: a stage may redirect sys.stderr to a log file while it works.
        self._stream = sys.stderr

    def advance(self, count: int = 1, log: str = "") -> None:
        """Add `count` to what is done, which may exceed an estimated total.

        `log` is shown at the end of the line.
        """
        self._done += count
        now = time.monotonic()
        if now - self._drawn >= self._seconds_between or self._done == self._total:
            self._drawn = now
            self._draw(log)

    def _draw(self, log: str) -> None:
        since, done_then = self._drawings[0]
        seconds_each = (self._drawn - since) / max(1, self._done - done_then)
        self._drawings.append((self._drawn, self._done))
        minutes, seconds = divmod(int(seconds_each * max(0, self._total - self._done)), 60)
        line = f"{self._label}: {self._done} of {self._total}, {minutes}:{seconds:02} left {log}"
        print(line.rstrip(), file=self._stream, flush=True)


class _ProgressBar(Progress):
    """A count toward `total` as a bar that is redrawn in place.

    It is redrawn from `advance` and not by a thread, because some libraries fork while it is shown.
    """

    _seconds_between = _SECONDS_BETWEEN_REDRAWS

    def __init__(self, bar: RichProgress, label: str, total: int, done: int) -> None:
        super().__init__(label, total, done)
        self._bar = bar
        self._task = bar.add_task(label, total=total, completed=done, log="")

    def _draw(self, log: str) -> None:
        self._bar.update(self._task, completed=self._done, log=log, refresh=True)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show a progress bar on a terminal, and plain lines elsewhere, until the block ends."""
    if not sys.stderr.isatty():
        yield Progress(label, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[log]}", markup=False),
    )
    console = Console(file=sys.stderr)
    with RichProgress(*columns, console=console, auto_refresh=False, redirect_stdout=False) as bar:
        yield _ProgressBar(bar, label, total, done)


@contextmanager
def capture_output(log: Path) -> Iterator[None]:
    """Redirect what libraries print to the file `log`.

    The file stays open, because their loggers hold it for the rest of the process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    with redirect_stdout(stream), redirect_stderr(stream):
        yield


def tolerate_encodings() -> None:
    """Let no character of input or output end the program.

    What the terminal's code page lacks is printed as "?". Input is UTF-8 where nothing else is set;
    bytes that are not are taken for Latin-1.
    """
    codecs.register_error("latin-1", _as_latin_1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        name = codecs.lookup(sys.stdin.encoding).name
        # Programs of Windows begin what they pipe with a BOM.
        encoding = "utf-8-sig" if name in ("ascii", "utf-8") else name
        with suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(encoding=encoding, errors="latin-1")


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    """Decode bytes that are not of the encoding as Latin-1, and say so once."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    _log_latin_1()
    return error.object[error.start : error.end].decode("latin-1"), error.end


@cache
def _log_latin_1() -> None:
    log("The input is not UTF-8 and is read as Latin-1. PYTHONIOENCODING names another encoding.")


def log(text: str) -> None:
    """Print a remark for the user to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_result(text: str, end: str = "\n") -> None:
    """Print a result to stdout."""
    print(text, end=end, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout: fitted to a terminal, or as aligned plain text elsewhere.

    Columns of numbers, with or without a unit, are aligned right. None is an empty cell.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False, padding=(0, 1))
    for name, *texts in zip(columns, *cells, strict=True):
        numeric = any(texts) and all(map(_NUMERIC.fullmatch, texts))
        table.add_column(Text(name), justify="right" if numeric else "left")
    for texts in cells:
        table.add_row(*map(Text, texts))
    console = Console(file=sys.stdout, width=None if is_terminal else 10_000)
    with console.capture() as rendered:
        console.print(table)
    lines = [line.rstrip() for line in rendered.get().splitlines()]
    print_result("\n".join(lines).strip("\n"))
