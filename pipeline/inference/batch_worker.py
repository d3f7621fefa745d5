"""Continuous batching in one llama.cpp context: many dialogues, each in a stream of cells of its own.

A dialogue that ends makes room for the next at once. Only new tokens are fed: a request's tokens are compared with what
its stream holds. `streams` says why answers do not depend on what runs beside them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.gguf.base import Array
from pipeline.inference.context import BatchContext, SequenceState
from pipeline.inference.model import Adapter, CacheType, LoadedModel
from pipeline.records import Completion, Request, Task


class TaskQueue:
    """The dialogues that wait. Whoever advances one holds the lock, so that dialogues need not be thread-safe."""

    def __init__(
        self,
        tasks: Iterable[Task],
        on_text: Callable[[str], None] | None,
        workers: int,
        threads: int,
    ) -> None:
        self._waiting = iter(tasks)
        self._lock = threading.Lock()
        self._threads = threads
        self._workers = workers
        self.on_text = on_text
        self.stopped = False

    def next(self) -> Task | None:
        """A dialogue that nobody has begun."""
        with self._lock:
            return next(self._waiting, None)

    def advance(self, task: Task, completion: Completion | None) -> Request | None:
        """The dialogue's next request, given the completion of the last; None when it has ended."""
        with self._lock:
            try:
                return task.send(completion) if completion else next(task)
            except StopIteration:
                return None

    def leave(self) -> None:
        """A worker has nothing left to do; the others share its threads."""
        with self._lock:
            self._workers -= 1

    @property
    def threads(self) -> int:
        """How many threads each worker may use by now."""
        return max(1, self._threads // max(1, self._workers))


@dataclass(slots=True)
class _Sequence(SequenceState):
    """A stream and the dialogue that runs in it."""

    task: Task | None = None


class BatchWorker:
    """One context with room for `sequences` dialogues of up to `context` tokens each; one thread at a time may run it."""

    def __init__(
        self,
        weights: LoadedModel,
        sequences: int,
        context: int,
        cache: CacheType,
        threads: int,
        adapter: Adapter | None = None,
    ) -> None:
        self._weights = weights
        self._room = context
        self._sequences = [_Sequence(n) for n in range(sequences)]
        self._streams = BatchContext(weights, self._sequences, context, cache, threads, adapter)

    def close(self) -> None:
        """Give the memory back."""
        self._streams.close()

    def run(self, queue: TaskQueue) -> None:
        """Take dialogues from the queue until none is left, and drive them to their end."""
        busy = [s for s in self._sequences if self._next_task(s, queue)]
        while busy and not queue.stopped:
            self._streams.use(queue.threads)
            for sequence in busy:
                while len(sequence.pending) > 1:
                    self._streams.prefill(sequence)
            for sequence, row in zip(busy, self._streams.decode(busy), strict=True):
                for piece in (
                    self._streams.sample(sequence, row),
                    self._streams.sample_draft(sequence, row),
                ):
                    if queue.on_text and piece:
                        queue.on_text(piece)
            ended = [
                s
                for s in busy
                if not (s.pending or self._advance(s, queue) or self._next_task(s, queue))
            ]
            for sequence in ended:
                self._leave(sequence, busy)
        queue.leave()

    def logits(self, tokens: Sequence[int]) -> Iterator[Array]:
        """For each of the tokens, the logits (vocabulary) of what follows it, float32; no dialogue may be running."""
        return self._streams.logits(tokens)

    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean negative log-likelihood of the texts' tokens, each but the first given those before it."""
        losses: list[float] = []
        for text in texts:
            tokens = self._weights.tokenize(text)[: self._room]
            losses += [
                _loss(row, token)
                for row, token in zip(self.logits(tokens[:-1]), tokens[1:], strict=True)
            ]
        return math.exp(sum(losses) / len(losses))

    def _next_task(self, sequence: _Sequence, queue: TaskQueue) -> bool:
        """Start tasks in a free sequence until one has something to generate."""
        while (task := queue.next()) is not None:
            sequence.task = task
            # A new dialogue starts in an empty stream: what the last one left must not matter.
            self._streams.forget(sequence)
            if self._ask(sequence, None, queue):
                return True
        return False

    def _advance(self, sequence: _Sequence, queue: TaskQueue) -> bool:
        """Hand the finished completion to the dialogue and take its next request."""
        done = Completion(sequence.text, sequence.tokens, sequence.prompt_tokens, sequence.finish)
        return self._ask(sequence, done, queue)

    def _ask(self, sequence: _Sequence, completion: Completion | None, queue: TaskQueue) -> bool:
        """Send `completion` and admit requests until one needs decoding; False when the dialogue has ended."""
        assert sequence.task is not None
        while (request := queue.advance(sequence.task, completion)) is not None:
            completion = self._admit(sequence, request)
            if completion is None:
                return True
        return False

    def _admit(self, sequence: _Sequence, request: Request) -> Completion | None:
        """Line up a prompt; one that leaves no room to answer is completed at once."""
        tokens = self._weights.tokenize(self._weights.template.render(request.messages))
        if len(tokens) + request.max_tokens > self._room:
            return Completion("", 0, len(tokens), "context")
        # Of another stream's beginning only an empty one takes a copy.
        self._streams.begin(sequence, request, tokens, least=len(tokens) if sequence.cached else 1)
        return None

    def _leave(self, sequence: _Sequence, busy: list[_Sequence]) -> None:
        """Take an ended dialogue out of `busy`; the last one moves to its stream.

        llama.cpp decodes rows of streams with a gap between their numbers in two passes, each as dear as the whole.
        """
        last = busy.pop()
        if last is sequence:
            return
        self._streams.copy(last, sequence)
        self._streams.forget(last)
        place, free = sequence.id, last.id
        last.cached, sequence.cached = sequence.cached, last.cached
        last.id, sequence.id = place, free
        self._sequences[place] = busy[place] = last
        self._sequences[free] = sequence


def _loss(logits: Array, token: int) -> float:
    """The negative log-likelihood of a token."""
    exact = logits.astype(np.float64)
    peak = float(exact.max())
    return math.log(float(np.exp(exact - peak).sum())) + peak - float(exact[token])
