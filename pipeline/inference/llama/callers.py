"""The threads that call llama.cpp to decode a batch; nothing else runs in them.

llama.cpp configures the AMX tiles of a thread once, and relies on it from then on. PyTorch leaves
another one behind, with which llama.cpp ends with an illegal instruction. So no thread that may run
PyTorch, such as the main one, decodes.

OpenMP creates a team of threads for each calling thread and keeps it for as long as the caller
lives. Teams that together outnumber the cores sleep at every barrier instead of spinning: those of
llama.cpp, and those of PyTorch in the same process. So the callers are few, and end with the last
context.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock
from types import ModuleType

from pipeline.inference.llama.model import LlamaHandle
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

    def decode(self, api: ModuleType, context: LlamaHandle, batch: object, threads: int) -> int:
        """Run llama_decode with `threads` threads, and return its status."""
        running = self._pool(threads).submit(api.llama_decode, context, batch)
        try:
            return int(running.result())
        finally:
            wait([running])  # after Ctrl-C too: the context must not be freed during a pass

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        """Return the callers of passes of `threads` threads: as many as the cores allow."""
        with self._lock:
            if threads not in self._pools:
                workers = max(1, core_count() // threads)
                self._pools[threads] = ThreadPoolExecutor(workers, "gatt decode")
            return self._pools[threads]


CALLERS = Callers()
"""Those of this process."""
