"""Continuous batching in one llama.cpp context: many dialogues, each in a sequence of its own.

A finished dialogue makes room for the next at once. Only new tokens are decoded: a prompt is
compared with what its sequence has in the cache. `context` explains why answers are independent of
the batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.gguf.base import Array
from pipeline.inference.llama.context import BatchContext, SequenceState
from pipeline.inference.llama.mixed_batch import MixedBatchContext
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.inference.logits import nll
from pipeline.records import Completion, Request, Task


def advance(task: Task, completion: Completion | None) -> Request | None:
    """Return a dialogue's next request, given the last completion; None at its end."""
    try:
        return task.send(completion) if completion else next(task)
    except StopIteration:
        return None


class TaskQueue:
    """The dialogues that wait for a worker, and the threads that the workers share.

    A lock is held while a dialogue advances, so that dialogues need not be thread-safe.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        on_text: Callable[[str], None] | None,
        *,
        workers: int,
        threads: int,
        stopping: threading.Event | None = None,
    ) -> None:
        self._waiting = iter(tasks)
        self._lock = threading.Lock()
        self._threads = threads
        self._workers = workers
        self._stopping = stopping
        self.on_text = on_text
        self.stopped = False

    def next(self) -> Task | None:
        """Return a dialogue that has not started, or None."""
        with self._lock:
            return next(self._waiting, None)

    def advance(self, task: Task, completion: Completion | None) -> Request | None:
        """Return the dialogue's next request, given the last completion; None at its end."""
        with self._lock:
            return advance(task, completion)

    def cancels(self, sequence: SequenceState) -> bool:
        """End an answer that has no token yet if the user has stopped it; return whether."""
        if sequence.tokens or not (self._stopping and self._stopping.is_set()):
            return False
        sequence.pending, sequence.finish = [], "cancelled"
        return True

    def leave(self) -> None:
        """Take a worker with nothing left to do out; the others share its threads."""
        with self._lock:
            self._workers -= 1

    @property
    def threads_per_worker(self) -> int:
        """Threads that each remaining worker may use."""
        return max(1, self._threads // max(1, self._workers))


@dataclass(slots=True, kw_only=True)
class _TaskSequence(SequenceState):
    """A sequence and the dialogue that runs in it."""

    task: Task | None = None


class BatchWorker:
    """One context for up to `sequences` dialogues; one thread at a time may run it."""

    def __init__(
        self, model: LoadedModel, sequences: int, settings: ContextSettings, threads: int
    ) -> None:
        self._model, self._n_ctx = model, settings.n_ctx
        self._sequences = [_TaskSequence(id=n) for n in range(sequences)]
        self.sequences = sequences
        self._mixed: MixedBatchContext[_TaskSequence] | None = None
        if settings.batch_tokens:
            self._mixed = MixedBatchContext(model, self._sequences, settings, threads)
        self._context = self._mixed or BatchContext(model, self._sequences, settings, threads)

    def close(self) -> None:
        """Free the memory."""
        self._context.close()

    def steer(self, vector: Array | None) -> None:
        """Apply a control vector (layers, n_embd) from now on, or none. No dialogue may run."""
        self._context.steer(vector)

    def run(self, queue: TaskQueue) -> None:
        """Take dialogues from the queue until none is left, and drive them to their end."""
        busy: list[_TaskSequence] = []
        while self._fill(busy, queue) and not queue.stopped:
            self._context.set_threads(queue.threads_per_worker)
            for piece in self._step(busy, queue):
                if queue.on_text and piece:
                    queue.on_text(piece)
            ended = [s for s in busy if not (s.pending or self._continue(s, queue))]
            for sequence in ended:
                self._remove(sequence, busy)
        queue.leave()

    def logits(self, tokens: Sequence[int], start: int = 0) -> Iterator[Array]:
        """Yield for each of `tokens[start:]` the float32 logits (vocab_size) of the token after it.

        No dialogue may be running.
        """
        return self._context.logits(tokens, start)

    def perplexity(self, texts: Iterable[str]) -> float:
        """Return exp of the mean NLL of the texts' tokens, without the first token of each.

        A text is truncated to the size of the context.
        """
        losses: list[float] = []
        for text in texts:
            tokens = self._model.tokenize(text)[: self._n_ctx]
            rows = zip(self.logits(tokens[:-1]), tokens[1:], strict=True)
            losses += [nll(logits, token) for logits, token in rows]
        return math.exp(sum(losses) / len(losses))

    def _step(self, busy: list[_TaskSequence], queue: TaskQueue) -> Iterator[str | None]:
        """Generate a token in each sequence; yield the text.

        On a CPU there are two where the draft was right. On a GPU there are none where only a part
        of the prompt was decoded. A chat that is stopped while its prompt is decoded has none.
        """
        if self._mixed:
            if not any(map(queue.cancels, busy)):
                yield from (piece for _, piece in self._mixed.step(busy))
            return
        for sequence in busy:
            while len(sequence.pending) > 1 and not queue.cancels(sequence):
                self._context.prefill(sequence)
        if any(map(queue.cancels, busy)):
            return
        for sequence, index in zip(busy, self._context.decode(busy), strict=True):
            yield self._context.sample(sequence, index)
            yield self._context.sample_draft(sequence, index)

    def _fill(self, busy: list[_TaskSequence], queue: TaskQueue) -> bool:
        """Start waiting dialogues in the free sequences; return whether any is busy.

        The busy ones have the ids from 0 on (`_remove`), so the first free one is next to them.
        """
        for sequence in self._sequences[len(busy) :]:
            if not self._next_task(sequence, queue):
                break
            busy.append(sequence)
        return bool(busy)

    def _continue(self, sequence: _TaskSequence, queue: TaskQueue) -> bool:
        """Go to the dialogue's next request, or to the next dialogue; False if there is none."""
        assert sequence.finish
        completion = Completion(
            sequence.text, sequence.tokens, sequence.prompt_tokens, sequence.finish
        )
        return self._advance(sequence, completion, queue) or self._next_task(sequence, queue)

    def _next_task(self, sequence: _TaskSequence, queue: TaskQueue) -> bool:
        """Start waiting dialogues in a sequence until one has something to generate."""
        while (task := queue.next()) is not None:
            sequence.task = task
            # A dialogue starts in an empty sequence: its result must not depend on the last one.
            self._context.clear(sequence)
            if self._advance(sequence, None, queue):
                return True
        return False

    def _advance(
        self, sequence: _TaskSequence, completion: Completion | None, queue: TaskQueue
    ) -> bool:
        """Send `completion` and start the next request; False when the dialogue has ended."""
        assert sequence.task is not None
        while (request := queue.advance(sequence.task, completion)) is not None:
            completion = self._start(sequence, request)
            if completion is None:
                return True
        return False

    def _start(self, sequence: _TaskSequence, request: Request) -> Completion | None:
        """Queue a prompt; return an empty completion if prompt and answer exceed the context."""
        tokens = self._model.tokenize(self._model.template.render(request.messages))
        if len(tokens) + request.max_tokens > self._n_ctx:
            return Completion("", 0, len(tokens), "context")
        # Only an empty sequence copies a prefix from another one: the copy replaces all its cells.
        min_copied = len(tokens) if sequence.cached else 1
        self._context.start(sequence, request, tokens, min_copied=min_copied)
        return None

    def _remove(self, ended: _TaskSequence, busy: list[_TaskSequence]) -> None:
        """Remove a sequence from `busy`; the last busy one takes its id.

        The ids in use stay 0 to n - 1. llama.cpp decodes sequences with a gap between their ids in
        two passes, each as expensive as the full one.
        """
        last = busy.pop()
        if last is not ended:
            self._context.move(last, ended)
            busy[last.id] = last
