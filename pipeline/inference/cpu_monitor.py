"""How many cores other programs leave to this one.

llama.cpp's threads wait for each other hundreds of times a token. Where another program holds a core, two threads on two cores
were measured to take a hundred times as long as one.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

_SECONDS = 1.0


class FreeCores(threading.Thread):
    """Looks once a second, from when it is started until it is closed; `count` is at least 1."""

    def __init__(self) -> None:
        super().__init__(name="gatt cores")
        self.count = os.cpu_count() or 1
        self._closed = threading.Event()
        self._last = _used()

    def run(self) -> None:
        """Look again and again."""
        self._look()
        while not self._closed.wait(_SECONDS):
            self._look()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()
        if self.ident:
            self.join()

    def _look(self) -> None:
        last, self._last = self._last, _used()
        passed, everybody, ours = (
            now - before for now, before in zip(self._last, last, strict=True)
        )
        others = (everybody - ours) / passed if passed else 0.0
        self.count = max(1, (os.cpu_count() or 1) - round(others))


def _used() -> tuple[float, float, float]:
    """Seconds: the clock, of all cores in use, and of these the ones that this process has used."""
    cores, process = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = (
        cores.idle
        + getattr(cores, "iowait", 0.0)
        + getattr(cores, "guest", 0.0)
        + getattr(cores, "guest_nice", 0.0)
    )
    return time.monotonic(), sum(cores) - idle, process.user + process.system
