"""A worker's side of its dialogues: their requests come one by one, from the driver.

A dialogue keeps its sequence, and so its KV cache, from the first request to its end. When an
answer is done, its context waits for the dialogue's next request: a few milliseconds on a network,
less than a pass with a gap between the sequences would cost (`batch_worker`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple

from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.batch_worker import BatchWorker, TaskQueue, advance
from pipeline.records import Completion, Request, Task


class Call(NamedTuple):
    """A request of a dialogue, and the future that receives the completion."""

    dialogue: int
    request: Request
    future: Future[Completion]


class CallQueue(TaskQueue):
    """The dialogues of one context of `sequences`.

    `wrap` and `threads` are those of the engine. `load` dialogues have been given to the context
    and have not ended; it belongs to the thread that submits the calls.
    """

    def __init__(
        self, sequences: int, wrap: Callable[[Task], Task], threads: Callable[[], int]
    ) -> None:
        super().__init__((), None, workers=1, threads=1)
        self._wrap, self._threads_now = wrap, threads
        self._changed = threading.Condition()
        self._new: deque[Call] = deque()
        self._next: dict[int, SimpleQueue[Call | None]] = {}
        self._running = 0
        self.sequences, self.load = sequences, 0

    def begin(self, call: Call) -> None:
        """Add a dialogue by its first request."""
        with self._changed:
            self._next[call.dialogue] = SimpleQueue()
            self._new.append(call)
            self._changed.notify()

    def proceed(self, dialogue: int, call: Call | None) -> None:
        """Hand a dialogue its next request, or None at its end."""
        self._next[dialogue].put(call)

    def stop(self) -> None:
        """Let the context's thread return as soon as it can."""
        with self._changed:
            self.stopped = True
            for waiting in self._next.values():
                waiting.put(None)
            self._changed.notify()

    def next(self) -> Task | None:
        """Return a dialogue that has not started; wait for one while no other one runs."""
        with self._changed:
            while not (self._new or self._running or self.stopped):
                self._changed.wait()
            if self.stopped or not self._new:
                return None
            self._running += 1
            return self._wrap(self._dialogue(self._new.popleft()))

    def advance(self, task: Task, completion: Completion | None) -> Request | None:
        """Return the dialogue's next request; it is waited for, so that no lock may be held."""
        return advance(task, completion)

    @property
    def threads_per_worker(self) -> int:
        """Threads that the context may use now."""
        return self._threads_now()

    def _dialogue(self, first: Call) -> Task:
        call: Call | None = first
        try:
            while call:
                call.future.set_result((yield call.request))
                call = self._next[first.dialogue].get()
        finally:
            with self._changed:
                self._running -= 1
                del self._next[first.dialogue]


class CallServer:
    """Runs the contexts of an engine, each in a thread, for dialogues that the driver advances.

    `cores` is the number of cores that the contexts share. All methods belong to one thread.
    """

    def __init__(self, engine: BatchEngine, cores: int) -> None:
        self._engine, self._cores = engine, cores
        self._queues = [CallQueue(w.sequences, engine.wrap, self._threads) for w in engine.workers]
        self.sequences = sum(queue.sequences for queue in self._queues)
        self._queue_of: dict[int, CallQueue] = {}
        self._pending: dict[int, Future[Completion]] = {}
        self._running = [
            threading.Thread(target=self._run, args=pair, daemon=True)
            for pair in zip(engine.workers, self._queues, strict=True)
        ]
        for thread in self._running:
            thread.start()

    def submit(
        self, dialogue: int, request: Request, ended: int | None = None
    ) -> Future[Completion]:
        """Return the future completion of a request; `ended` is a dialogue that ends with it.

        A new dialogue goes to the context with most sequences to spare.
        """
        call = Call(dialogue, request, Future())
        self._pending[dialogue] = call.future
        if queue := self._queue_of.get(dialogue):
            queue.proceed(dialogue, call)
            return call.future
        last = self._release(ended)
        queue = max(self._queues, key=lambda q: (q.sequences - q.load, q is last))
        queue.load += 1
        self._queue_of[dialogue] = queue
        queue.begin(call)  # first, so that the context goes on with it at once
        if last and ended is not None:
            last.proceed(ended, None)
        return call.future

    def end(self, dialogue: int) -> None:
        """Free the sequence of a dialogue that has ended."""
        if queue := self._release(dialogue):
            queue.proceed(dialogue, None)

    def close(self) -> None:
        """End all contexts and free the memory."""
        for queue in self._queues:
            queue.stop()
        for thread in self._running:
            thread.join()
        self._engine.close()

    def _release(self, dialogue: int | None) -> CallQueue | None:
        """Take a dialogue off the books, and return its queue."""
        if dialogue is None:
            return None
        self._pending.pop(dialogue, None)
        queue = self._queue_of.pop(dialogue, None)
        if queue:
            queue.load -= 1
        return queue

    def _threads(self) -> int:
        """Return the threads of each context that has a dialogue."""
        return max(1, self._cores // max(1, sum(queue.load > 0 for queue in self._queues)))

    def _run(self, worker: BatchWorker, queue: CallQueue) -> None:
        try:
            worker.run(queue)
        except BaseException as error:  # it is the caller's: a bug, or too little memory
            for future in list(self._pending.values()):
                if not future.done():
                    future.set_exception(error)
