"""One llama.cpp context, its cache cut into streams of cells, and the answers that are generated in them.

On a CPU an answer does not depend on what runs beside it (llama.cpp of llama-cpp-python 0.3.36): it is a function of its
text and seed, bit by bit. That takes three things, and each was found by measurement. Every sequence has a stream of cells of
its own; a prompt is fed in chunks below 64 tokens (from there on another kernel sums in another order); and no stream is fed a
token alone, because a lone one is multiplied by another kernel, too: it gets company, which is forgotten at once. Flash
attention would be as exact without company, and is four times as slow on a CPU: 48 ms a token at 1,500 tokens of context, where
this takes 19 (135 million parameters, one core). Company is left out where answers are not compared but awaited: the server's
streams are not `exact`, and differ as those of llama.cpp do, by rounding.

Who decides what is generated in which stream: `worker` for dialogues that are all there, `serving` for requests that come.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from pipeline.gguf.base import Array
from pipeline.inference.model import Adapter, CacheType, LoadedModel
from pipeline.records import Request

_CHUNK = 63
_CONTEXT = 3
"""Tokens from which the next one is guessed, or from fewer."""
_KNOWN = 1 << 17
"""Contexts that are remembered; then all are forgotten."""
_GAP = 2
"""Up to so many idle streams between two busy ones are decoded with them: that is cheaper than two passes."""


class _Row(NamedTuple):
    """A token to be decoded; `logits`: what follows it is asked for."""

    stream: int
    position: int
    token: int
    logits: bool


@dataclass(slots=True)
class SequenceState:
    """One stream of the cache and the answer that is generated in it.

    The cells of the tokens `cached` are filled, those of `pending` are not yet. Where there is a `guess` at the token behind
    these, its cell is filled, too.
    """

    id: int
    cached: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    request: Request | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish: str = ""
    guess: int | None = None
    decoder: Any = None
    sampler: Any = None


S = TypeVar("S", bound=SequenceState)


class BatchContext(Generic[S]):
    """A context with a cache of `cells` tokens of a `kind` for each of `streams`; one thread at a time may use it.

    `exact`: no token is fed alone, so that answers do not depend on what is reused or runs beside them.

    Raises:
        GattError: no memory for it, or an adapter of another base.
    """

    def __init__(
        self,
        weights: LoadedModel,
        streams: list[S],
        cells: int,
        kind: CacheType,
        threads: int,
        adapter: Adapter | None = None,
        exact: bool = True,
    ) -> None:
        self._weights, self._api, self._threads = weights, weights.api, threads
        self._streams, self._exact = streams, exact
        most = max(_CHUNK, 2 * len(streams)) + 1
        self._context = weights.new_context(len(streams), cells, most, kind, threads, adapter)
        self._memory = self._api.llama_get_memory(self._context)
        self._batch = self._api.llama_batch_init(most, 0, 1)
        self._followed: dict[tuple[int, ...], int] = {}

    def close(self) -> None:
        """Give the memory back."""
        for stream in self._streams:
            self.release(stream)
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)

    def use(self, threads: int) -> None:
        """Decode with so many threads from now on."""
        if threads != self._threads:
            self._threads = threads
            self._api.llama_set_n_threads(self._context, threads, threads)

    def begin(self, stream: S, request: Request, tokens: list[int], least: int = 1) -> int:
        """Line up the `tokens` of a prompt that the cache lacks, to answer it; returns how many it has.

        If another stream has `least` of the first tokens more than this one, they are copied from there.
        """
        fullest = max(self._streams, key=lambda s: common_prefix_length(s.cached, tokens))
        if (
            common_prefix_length(fullest.cached, tokens[:-1])
            >= common_prefix_length(stream.cached, tokens[:-1]) + least
        ):
            self.copy(fullest, stream)
        shared = common_prefix_length(stream.cached, tokens[:-1])
        self._api.llama_memory_seq_rm(self._memory, stream.id, shared, -1)
        del stream.cached[shared:]
        stream.request, stream.pending = request, tokens[shared:]
        stream.prompt_tokens, stream.tokens, stream.text, stream.finish = len(tokens), 0, "", ""
        stream.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.release(stream)
        stream.sampler = self._weights.sampler(request)
        return shared

    def forget(self, stream: S) -> None:
        """Empty the cells."""
        self._api.llama_memory_seq_rm(self._memory, stream.id, 0, -1)
        stream.cached = []

    def copy(self, source: S, target: S) -> None:
        """Fill the cells of one stream as those of another are."""
        self.forget(target)
        self._api.llama_memory_seq_cp(self._memory, source.id, target.id, 0, -1)
        target.cached = list(source.cached)

    def release(self, stream: S) -> None:
        """Free the sampler of an answer that has ended, and forget a guess that nobody has asked about."""
        if stream.guess is not None:
            self._drop(stream)
        if stream.sampler:
            self._api.llama_sampler_free(stream.sampler)
            stream.sampler = None

    def prefill(self, stream: S) -> None:
        """Feed one chunk of a prompt, all but its last token (which is decoded with everybody's)."""
        chunk = stream.pending[: min(_CHUNK, len(stream.pending) - 1)]
        self._feed(
            [_Row(stream.id, len(stream.cached) + n, token, False) for n, token in enumerate(chunk)]
        )
        stream.cached += chunk
        del stream.pending[: len(chunk)]

    def decode(self, busy: Sequence[S]) -> list[int]:
        """Feed the last pending token of each stream (ordered by their numbers); the rows at which `sample` finds them."""
        rows = []
        for stream in busy:
            rows.append(_Row(stream.id, len(stream.cached), stream.pending[0], True))
            stream.cached += stream.pending
            stream.pending = []
            stream.guess = self._guess(stream.cached) if self._exact else None
            if stream.guess is not None:
                rows.append(_Row(stream.id, len(stream.cached), stream.guess, True))
        places = self._feed(rows)
        first = {
            row.stream: place for row, place in zip(reversed(rows), reversed(places), strict=True)
        }
        return [first[stream.id] for stream in busy]

    def sample(self, stream: S, row: int) -> str:
        """Draw the next token, and return its text. It is left pending, or `finish` says why the answer ends."""
        piece = self._draw(stream, row)
        if stream.guess is not None and stream.pending != [stream.guess]:
            self._drop(stream)
        return piece

    def sample_draft(self, stream: S, row: int) -> str | None:
        """After `sample` of the same row: where it drew what was guessed, the text of the token behind it."""
        if stream.guess is None:
            return None
        stream.cached.append(stream.guess)
        stream.guess = None
        return self._draw(stream, row + 1)

    def _drop(self, stream: S) -> None:
        """The guess was wrong."""
        self._api.llama_memory_seq_rm(self._memory, stream.id, len(stream.cached), -1)
        stream.guess = None

    def _draw(self, stream: S, row: int) -> str:
        assert stream.request is not None
        token = self._api.llama_sampler_sample(stream.sampler, self._context, row)
        stream.tokens += 1
        stream.pending = []
        ends = self._weights.ends(token)
        piece: str = stream.decoder.decode(b"" if ends else self._weights.piece(token), ends)
        stream.text += piece
        if ends:
            stream.finish = "stop"
        elif stream.request.stop_when and stream.request.stop_when(stream.text):
            stream.finish = "enough"
        elif stream.tokens < stream.request.max_tokens:
            stream.pending = [token]
            if self._exact:
                self._learn(stream.cached, token)
        else:
            stream.finish = "length"
        return piece

    def _guess(self, past: Sequence[int]) -> int | None:
        return next((self._followed[few] for few in _pasts(past) if few in self._followed), None)

    def _learn(self, past: Sequence[int], token: int) -> None:
        if len(self._followed) > _KNOWN:
            self._followed.clear()
        for few in _pasts(past):
            self._followed[few] = token

    def logits(self, tokens: Sequence[int]) -> Iterator[Array]:
        """For each of the tokens, the logits (vocabulary) of what follows it, float32; nothing may be running."""
        self.forget(self._streams[0])
        for start in range(0, len(tokens), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(tokens)))
            for row in self._feed([_Row(0, at, tokens[at], True) for at in chunk]):
                found = self._api.llama_get_logits_ith(self._context, row)
                yield np.ctypeslib.as_array(found, (self._weights.vocabulary,)).copy()
        self.forget(self._streams[0])

    def _feed(self, rows: Sequence[_Row]) -> list[int]:
        """Decode `rows`, ordered by stream; where each of them is in the batch."""
        batch, (fed, places, guests) = self._batch, self._with_guests(rows)
        batch.n_tokens = len(fed)
        for n, (stream, position, token, logits) in enumerate(fed):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, logits
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, stream
        status = self._decoded(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(fed)} tokens")
        for guest in guests:
            self._api.llama_memory_seq_rm(self._memory, guest.stream, guest.position, -1)
        return places

    def _decoded(self, batch: Any) -> int:
        """llama_decode's status. OpenMP's threads belong to the thread that calls them, and do not spin where they are more than
        the cores, which makes a token three times as slow: passes of several threads come from few callers.
        """
        if self._threads == 1:
            return int(self._api.llama_decode(self._context, batch))
        running = _callers(self._threads).submit(self._api.llama_decode, self._context, batch)
        try:
            return int(running.result())
        finally:
            wait([running])  # Ctrl-C is no reason to take the context away from under it

    def _with_guests(self, rows: Sequence[_Row]) -> tuple[list[_Row], list[int], list[_Row]]:
        """The rows of a batch, the places of `rows` in it, and the guests: tokens that are forgotten at once.

        Where answers are to be exact, a token that is its stream's only one gets another for company. And llama.cpp decodes
        streams with a gap between their numbers in two passes: small gaps are filled.
        """
        fed: list[_Row] = []
        places: list[int] = []
        guests: list[_Row] = []
        per_stream = Counter(row.stream for row in rows)
        for row, after in zip(rows, [*rows[1:], None], strict=True):
            places.append(len(fed))
            fed.append(row)
            lone = self._exact and per_stream[row.stream] == 1
            here = [_Row(row.stream, row.position + 1, row.token, False)] if lone else []
            gap = self._streams[row.stream + 1 : after.stream] if after else []
            for stream in gap if len(gap) <= _GAP else []:
                here += [
                    _Row(stream.id, len(stream.cached) + n, row.token, False)
                    for n in range(1 + self._exact)
                ]
            fed += here
            guests += here
        return fed, places, guests


@cache
def _callers(threads: int) -> ThreadPoolExecutor:
    """Those that call passes of so many threads: as many as the cores can serve."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads), "gatt wide")


def _pasts(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The last few tokens, the longest stretch first."""
    last = tuple(tokens[-_CONTEXT:])
    return [last[n:] for n in range(len(last))]


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is a hundred times as quick as comparing tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
