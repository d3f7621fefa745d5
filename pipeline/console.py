"""The only place that prints. Progress and remarks go to stderr, results to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


class Progress:
    """A count towards `total` with the time left; one line redrawn on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._before = label, total, done, done
        self._start = self._shown = time.monotonic()
        self._stream = (
            sys.stderr
        )  # it stays this one where a stage sends a library's chatter elsewhere

    def advance(self, count: int = 1, log: str = "") -> None:
        """Count `count` more; `log` is shown at the end of the line."""
        self._done += count
        now = time.monotonic()
        live = self._stream.isatty()
        if now - self._shown < (0.2 if live else 10) and self._done < self._total:
            return
        self._shown = now
        fresh = max(1, self._done - self._before)
        left = (now - self._start) / fresh * max(0, self._total - self._done)
        line = f"{self._label}: {self._done} of {self._total}, {int(left) // 60}:{int(left) % 60:02} left {log}".rstrip()
        self._stream.write(f"\r\x1b[K{line}" if live else f"{line}\n")
        self._stream.flush()


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """Show a `Progress` and close its line."""
    yield Progress(label, total, done)
    if sys.stderr.isatty():
        sys.stderr.write("\n")


@contextmanager
def capture_output(log: Path) -> Iterator[None]:
    """Send what libraries print to the file `log`. It stays open: their loggers keep it for the rest of the process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", encoding="utf-8", buffering=1)
    with redirect_stdout(stream), redirect_stderr(stream):
        yield


def log(text: str) -> None:
    """A remark for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def print_result(text: str, end: str = "\n") -> None:
    """A result."""
    print(text, end=end, flush=True)
