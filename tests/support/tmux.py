"""A terminal with a program in it, as a user sees it."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.05


class Terminal:
    """A tmux session; `server` is the command that reaches it."""

    def __init__(self, server: Sequence[str]) -> None:
        self._server = server

    def _run(self, *words: str) -> str:
        done = subprocess.run(
            [*self._server, *words], check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    def type(self, *keys: str) -> None:
        """Type texts and keys, such as "Enter" or "C-c"."""
        self._run("send-keys", *keys)

    def resize(self, columns: int) -> None:
        """Change the width."""
        self._run("resize-window", "-x", str(columns))

    @property
    def screen(self) -> str:
        """The visible text."""
        return self._run("capture-pane", "-p")

    def wait(self, expected: str, seconds: float = 90) -> str:
        """Wait until the screen contains a text, and return the screen."""
        return self.wait_until(lambda screen: expected in screen, seconds)

    def wait_until(self, holds: Callable[[str], bool], seconds: float = 90) -> str:
        """Wait until `holds` is true of the screen, and return the screen."""
        end = time.monotonic() + seconds
        while not holds(screen := self.screen):
            assert time.monotonic() < end, screen
            time.sleep(_POLL_SECONDS)
        return screen


@contextmanager
def terminal(command: Sequence[str], home: Path, columns: int) -> Iterator[Terminal]:
    """Run `command` in a terminal; at its end it shows "left". The program's data is in `home`."""
    server = ["tmux", "-L", f"gatt-{os.getpid()}", "-f", "/dev/null"]
    environment = os.environ | {
        "XDG_DATA_HOME": str(home),
        "TERM": "xterm-256color",
        "LC_ALL": "C.UTF-8",
    }
    size = ["-x", str(columns), "-y", "100"]  # an answer on a busy machine fits
    start = f"{shlex.join(command)}; echo left; sleep 600"
    subprocess.run([*server, "new-session", "-d", *size, start], check=True, env=environment)
    try:
        yield Terminal(server)
    finally:
        subprocess.run([*server, "kill-server"], check=False)
