"""Continuous batching in one llama.cpp context: many dialogues, each in a stream of cells of its own.

A dialogue that ends makes room for the next at once. Only new tokens are fed: a request's tokens are compared with what
its stream holds.

On a CPU an answer does not depend on what runs beside it (llama.cpp of llama-cpp-python 0.3.36): a request is a
function of its text and seed, bit by bit. That takes four things, and each was found by measurement. Every sequence has
a stream of cells of its own; flash attention is on; a prompt is fed in chunks below 64 tokens (from there on another
kernel sums in another order); and no token is decoded alone, because a lone one has its cache split among the threads.
"""

from __future__ import annotations

import codecs
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.backends.weights import Adapter, CacheType, Weights
from pipeline.gguf.base import Array
from pipeline.records import Completion, Request, Task

_CHUNK = 63


class Queue:
    """The dialogues that wait. Whoever advances one holds the lock, so that dialogues need not be thread-safe."""

    def __init__(self, tasks: Iterable[Task], on_text: Callable[[str], None] | None, workers: int, threads: int) -> None:
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
class _Sequence:
    """One stream of the cache and the dialogue that runs in it. `cached` are the tokens whose cells are filled."""

    id: int
    task: Task | None = None
    request: Request | None = None
    cached: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish: str = ""
    decoder: Any = None
    sampler: Any = None


class Worker:
    """One context with room for `sequences` dialogues of up to `context` tokens each; one thread at a time may run it."""

    def __init__(
        self, weights: Weights, sequences: int, context: int, cache: CacheType, threads: int, adapter: Adapter | None = None
    ) -> None:
        self._weights, self._api = weights, weights.api
        self._room = context
        self._threads = threads
        most = max(_CHUNK, sequences) + 1
        # One stream more than dialogues: a lone token gets company there.
        self._context = weights.new_context(sequences + 1, context, most, cache, threads, adapter)
        self._memory = self._api.llama_get_memory(self._context)
        self._batch = self._api.llama_batch_init(most, 0, 1)
        self._sequences = [_Sequence(n) for n in range(sequences + 1)]

    def close(self) -> None:
        """Give the memory back."""
        for sequence in self._sequences:
            self._free_sampler(sequence)
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)

    def run(self, queue: Queue) -> None:
        """Take dialogues from the queue until none is left, and drive them to their end."""
        busy = [s for s in self._sequences[:-1] if self._next_task(s, queue)]
        while busy and not queue.stopped:
            self._use(queue.threads)
            for sequence in busy:
                while len(sequence.pending) > 1:
                    self._prefill(sequence)
            self._decode(busy)
            for row, sequence in enumerate(busy):
                self._sample(sequence, row, queue.on_text)
            ended = [s for s in busy if not (s.pending or self._advance(s, queue) or self._next_task(s, queue))]
            for sequence in ended:
                self._leave(sequence, busy)
        queue.leave()

    def logits(self, tokens: Sequence[int]) -> Iterator[Array]:
        """For each of the tokens, the logits (vocabulary) of what follows it, float32; no dialogue may be running."""
        self._forget(self._sequences[0])
        for start in range(0, len(tokens), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(tokens)))
            self._feed([(0, at, tokens[at], True) for at in chunk])
            for row in range(len(chunk)):
                found = self._api.llama_get_logits_ith(self._context, row)
                yield np.ctypeslib.as_array(found, (self._weights.vocabulary,)).copy()
        self._forget(self._sequences[0])

    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean negative log-likelihood of the texts' tokens, each but the first given those before it."""
        losses: list[float] = []
        for text in texts:
            tokens = self._weights.tokenize(text)[: self._room]
            losses += [_loss(row, token) for row, token in zip(self.logits(tokens[:-1]), tokens[1:], strict=True)]
        return math.exp(sum(losses) / len(losses))

    def _use(self, threads: int) -> None:
        if threads != self._threads:
            self._threads = threads
            self._api.llama_set_n_threads(self._context, threads, threads)

    def _forget(self, sequence: _Sequence) -> None:
        self._api.llama_memory_seq_rm(self._memory, sequence.id, 0, -1)
        sequence.cached = []

    def _next_task(self, sequence: _Sequence, queue: Queue) -> bool:
        """Start tasks in a free sequence until one has something to generate."""
        while (task := queue.next()) is not None:
            sequence.task = task
            # A new dialogue starts in an empty stream: what the last one left must not matter.
            self._forget(sequence)
            if self._ask(sequence, None, queue):
                return True
        return False

    def _advance(self, sequence: _Sequence, queue: Queue) -> bool:
        """Hand the finished completion to the dialogue and take its next request."""
        done = Completion(sequence.text, sequence.tokens, sequence.prompt_tokens, sequence.finish)
        return self._ask(sequence, done, queue)

    def _ask(self, sequence: _Sequence, completion: Completion | None, queue: Queue) -> bool:
        """Send `completion` and admit requests until one needs decoding; False when the dialogue has ended."""
        assert sequence.task is not None
        while (request := queue.advance(sequence.task, completion)) is not None:
            completion = self._admit(sequence, request)
            if completion is None:
                return True
        return False

    def _admit(self, sequence: _Sequence, request: Request) -> Completion | None:
        """Line up the tokens that the cache lacks; a prompt that leaves no room to answer is completed at once."""
        tokens = self._weights.tokenize(self._weights.template.render(request.messages))
        if len(tokens) + request.max_tokens > self._room:
            return Completion("", 0, len(tokens), "context")
        shared = self._keep_shared(sequence, tokens[:-1])
        sequence.request, sequence.pending = request, tokens[shared:]
        sequence.prompt_tokens, sequence.tokens, sequence.text = len(tokens), 0, ""
        sequence.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._free_sampler(sequence)
        sequence.sampler = self._weights.sampler(request)
        return None

    def _keep_shared(self, sequence: _Sequence, tokens: list[int]) -> int:
        """Keep of the cache what `tokens` begin with; an empty stream takes it from the one that holds most of it."""
        if not sequence.cached:
            fullest = max(self._sequences, key=lambda s: _common(s.cached, tokens))
            if fullest is not sequence and _common(fullest.cached, tokens):
                self._copy(fullest, sequence)
        shared = _common(sequence.cached, tokens)
        self._api.llama_memory_seq_rm(self._memory, sequence.id, shared, -1)
        del sequence.cached[shared:]
        return shared

    def _copy(self, source: _Sequence, target: _Sequence) -> None:
        self._api.llama_memory_seq_cp(self._memory, source.id, target.id, 0, -1)
        target.cached = list(source.cached)

    def _leave(self, sequence: _Sequence, busy: list[_Sequence]) -> None:
        """Take an ended dialogue out of `busy`; the last one moves to its stream.

        llama.cpp decodes rows of streams with a gap between their numbers in two passes, each as dear as the whole.
        """
        last = busy.pop()
        if last is sequence:
            return
        self._forget(sequence)
        self._copy(last, sequence)
        self._forget(last)
        place, free = sequence.id, last.id
        last.cached, sequence.cached = sequence.cached, last.cached
        last.id, sequence.id = place, free
        self._sequences[place] = busy[place] = last
        self._sequences[free] = sequence

    def _prefill(self, sequence: _Sequence) -> None:
        """Feed one chunk of a prompt, all but its last token (which is decoded with everybody's)."""
        chunk = sequence.pending[: min(_CHUNK, len(sequence.pending) - 1)]
        self._feed([(sequence.id, len(sequence.cached) + n, token, False) for n, token in enumerate(chunk)])
        sequence.cached += chunk
        del sequence.pending[: len(chunk)]

    def _decode(self, busy: list[_Sequence]) -> None:
        """One new token for each sequence; the logits are in the rows of the batch in this order."""
        self._feed([(s.id, len(s.cached), s.pending[0], True) for s in busy])
        for sequence in busy:
            sequence.cached += sequence.pending
            sequence.pending = []

    def _feed(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Decode (stream, position, token, logits?) rows; a lone one with another token beside it, forgotten at once."""
        company = self._sequences[rows[0][0] + 1] if len(rows) == 1 else None
        if company:
            rows = [*rows, (company.id, len(company.cached), rows[0][2], False)]
        batch = self._batch
        batch.n_tokens = len(rows)
        for n, (stream, position, token, logits) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, logits
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, stream
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} tokens")
        if company:
            self._api.llama_memory_seq_rm(self._memory, company.id, len(company.cached), -1)

    def _sample(self, sequence: _Sequence, row: int, on_text: Callable[[str], None] | None) -> None:
        """Draw the next token; leave it pending, or nothing where the answer ends."""
        token = self._api.llama_sampler_sample(sequence.sampler, self._context, row)
        sequence.tokens += 1
        assert sequence.request is not None
        if self._weights.ends(token):
            sequence.text += sequence.decoder.decode(b"", True)
            sequence.finish = "stop"
            return
        piece = sequence.decoder.decode(self._weights.piece(token))
        sequence.text += piece
        if on_text and piece:
            on_text(piece)
        if sequence.request.enough and sequence.request.enough(sequence.text):
            sequence.finish = "enough"
        elif sequence.tokens < sequence.request.max_tokens:
            sequence.pending = [token]
        else:
            sequence.finish = "length"

    def _free_sampler(self, sequence: _Sequence) -> None:
        if sequence.sampler:
            self._api.llama_sampler_free(sequence.sampler)
            sequence.sampler = None


def _loss(logits: Array, token: int) -> float:
    """The negative log-likelihood of a token."""
    exact = logits.astype(np.float64)
    peak = float(exact.max())
    return math.log(float(np.exp(exact - peak).sum())) + peak - float(exact[token])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
