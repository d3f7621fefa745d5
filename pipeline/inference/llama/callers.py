"""The threads that call llama.cpp for passes of several threads.

OpenMP creates a team of threads for each calling thread and keeps it for as long as the caller
lives. Teams that together outnumber the cores sleep at every barrier instead of spinning: those of
llama.cpp, and those of PyTorch in the same process. So the callers are few, and end with the last
context.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from pipeline.system import core_count


class Callers:
    """Pools of calling threads, by the threads of a pass, while there are contexts."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._contexts = 0
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def open(self) -> None:
        """Count a context."""
        with self._lock:
            self._contexts += 1

    def close(self) -> None:
        """Count a context less, and end all threads with the last one."""
        with self._lock:
            self._contexts -= 1
            if not self._contexts:
                for pool in self._pools.values():
                    pool.shutdown()
                self._pools.clear()

    def pool(self, threads: int) -> ThreadPoolExecutor:
        """Return the callers of passes of `threads` threads: as many as the cores allow."""
        with self._lock:
            if threads not in self._pools:
                workers = max(1, core_count() // threads)
                self._pools[threads] = ThreadPoolExecutor(workers, "gatt decode")
            return self._pools[threads]


CALLERS = Callers()
"""Those of this process."""
