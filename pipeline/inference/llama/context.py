"""One llama.cpp context: a KV cache with a stream per sequence, and the generation in it.

Batch-invariant decoding. On a CPU, an answer is a function of its prompt and seed, bit for bit.
What else is in the batch or was in the cache has no effect (measured with llama-cpp-python 0.3.36):

1. Each sequence has its own KV stream (`kv_unified` is off), so attention never spans the cells of
   another sequence.
2. Prefill uses chunks of at most 63 tokens. From 64 on, another matrix kernel sums in another
   order.
3. A sequence never has a single row in a batch. A product with one row also uses another kernel, so
   a padding token is decoded behind it and removed from the cache at once.
4. Flash attention is off. It would make 3 unnecessary, but is several times slower on a CPU.

A draft token can take the place of the padding token of 3, at no cost. If the sampler draws it, the
next token is already decoded (n-gram speculative decoding, see `ngram_drafter`).

With `exact=False` there are no padding and draft tokens (3), and results differ by rounding, as
they do in llama.cpp. The server does so by default: its users do not compare answers. No GPU is
exact: `mixed_batch` has what is different there.

A model that has a state (`LoadedModel.has_state`) is not exact either. Tokens cannot be removed
from a state, only all of them at once: there are no padding and draft tokens, and a prompt uses a
cache again only if it continues all of it.

Other modules decide what is generated in which sequence: `batch_worker` for dialogues that are
known in advance, `scheduler` for requests that arrive at any time.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from pipeline.gguf.base import Array
from pipeline.inference.llama.batch_builder import MAX_GAP, BatchBuilder, BatchRow
from pipeline.inference.llama.callers import CALLERS
from pipeline.inference.llama.control import set_control_vector
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.inference.llama.ngram_drafter import NgramDrafter
from pipeline.inference.llama.sampler import Sampler
from pipeline.inference.logits import TokenLogprob, log_softmax
from pipeline.records import FinishReason, Request

_PREFILL_CHUNK = 63
"""Tokens of a prompt in one batch: one less than where llama.cpp changes its kernel."""


@dataclass(slots=True, kw_only=True)
class SequenceState:
    """A sequence of the KV cache, and the answer that is generated in it.

    The cells of the tokens `cached` are filled, those of the tokens `pending` are not yet. If
    there is a `draft` of the token after them, its cell is filled, too.
    """

    id: int
    cached: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    draft: int | None = None
    request: Request | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish: FinishReason | None = None
    decoder: codecs.IncrementalDecoder | None = None
    sampler: Sampler | None = None
    logprob: TokenLogprob | None = None


S = TypeVar("S", bound=SequenceState)


class BatchContext(Generic[S]):
    """A llama.cpp context for `sequences`, whose ids are their indices; not thread-safe.

    `exact`: decode batch-invariantly, as the module's docstring explains.

    Raises:
        GattError: too little memory, or an adapter of another base.
    """

    _max_gap = MAX_GAP

    def __init__(
        self,
        model: LoadedModel,
        sequences: list[S],
        settings: ContextSettings,
        threads: int,
        *,
        exact: bool = True,
    ) -> None:
        self._model, self._api, self._threads = model, model.api, threads
        self._sequences, self._exact = sequences, exact and not model.has_state
        self._drafter = NgramDrafter() if self._exact else None
        # A chunk of a prompt, or two rows of each sequence; a chunk of one token gets a padding.
        batch_size = settings.batch_tokens or max(_PREFILL_CHUNK, 2 * len(sequences)) + 1
        self._context = model.new_context(
            settings, sequences=len(sequences), batch_size=batch_size, threads=threads
        )
        self._memory = self._api.llama_get_memory(self._context)
        self._batch = self._api.llama_batch_init(batch_size, 0, 1)
        CALLERS.open()

    def close(self) -> None:
        """Free the memory."""
        for sequence in self._sequences:
            self.release(sequence)
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        CALLERS.close()

    def set_threads(self, threads: int) -> None:
        """Decode with this number of threads from now on."""
        if threads != self._threads:
            self._threads = threads
            self._api.llama_set_n_threads(self._context, threads, threads)

    def steer(self, vector: Array | None) -> None:
        """Apply a control vector (layers, n_embd) from now on, or none; no sequence may be in use.

        All cells are emptied, because they were computed under another one.
        """
        for sequence in self._sequences:
            self.clear(sequence)
        set_control_vector(self._api, self._context, vector)

    def start(
        self, sequence: S, request: Request, tokens: list[int], *, min_copied: int = 1
    ) -> int:
        """Queue the part of a prompt that is not cached; return the number of cached tokens.

        If another sequence has at least `min_copied` more of the leading tokens, its cells are
        copied.
        """
        prompt = tokens[:-1]  # the last token is always decoded: the answer starts at its logits
        source = max(self._sequences, key=lambda s: self._usable(s, tokens))
        gain = self._usable(source, prompt) - self._usable(sequence, prompt)
        if gain >= min_copied:
            self._copy(source, sequence)
        shared = self._usable(sequence, prompt)
        self._truncate(sequence, shared)
        sequence.request, sequence.prompt_tokens = request, len(tokens)
        sequence.pending = tokens[shared:]
        sequence.tokens, sequence.text, sequence.finish = 0, "", None
        sequence.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.release(sequence)
        sequence.sampler = self._model.new_sampler(request, tokens)
        return shared

    def clear(self, sequence: S) -> None:
        """Empty the cells of a sequence."""
        self._api.llama_memory_seq_rm(self._memory, sequence.id, 0, -1)
        sequence.cached = []

    def move(self, source: S, target: S) -> None:
        """Exchange the ids of two sequences, with the cells of `source`; `target` becomes empty."""
        self._copy(source, target)
        self.clear(source)
        source.cached, target.cached = target.cached, source.cached
        source.id, target.id = target.id, source.id
        self._sequences[source.id], self._sequences[target.id] = source, target

    def release(self, sequence: S) -> None:
        """Free the sampler of an answer that has ended, and drop a draft that was not used."""
        if sequence.draft is not None:
            self._drop_draft(sequence)
        if sequence.sampler:
            sequence.sampler.close()
            sequence.sampler = None

    def prefill(self, sequence: S) -> None:
        """Decode one chunk of a prompt, without its last token: `decode` batches that one."""
        chunk = sequence.pending[: min(_PREFILL_CHUNK, len(sequence.pending) - 1)]
        first = len(sequence.cached)
        self._decode_rows(
            [BatchRow(sequence.id, n, token, logits=False) for n, token in enumerate(chunk, first)]
        )
        sequence.cached += chunk
        del sequence.pending[: len(chunk)]

    def decode(self, sequences: Sequence[S]) -> list[int]:
        """Decode the last pending token of each sequence, ordered by id; return batch indices."""
        rows: list[BatchRow] = []
        starts: list[int] = []
        for sequence in sequences:
            starts.append(len(rows))
            position = len(sequence.cached)
            rows.append(BatchRow(sequence.id, position, sequence.pending[0], logits=True))
            sequence.cached += sequence.pending
            sequence.pending = []
            sequence.draft = self._drafter.draft(sequence.cached) if self._drafter else None
            if sequence.draft is not None:
                rows.append(BatchRow(sequence.id, position + 1, sequence.draft, logits=True))
        indices = self._decode_rows(rows)
        return [indices[start] for start in starts]

    def sample(self, sequence: S, index: int) -> str:
        """Draw the token after a row of the batch, given by its index, and return its text.

        The token is left pending, or `finish` says why the answer has ended.
        """
        piece = self._draw(sequence, index)
        if sequence.draft is not None and sequence.pending != [sequence.draft]:
            self._drop_draft(sequence)
        return piece

    def sample_draft(self, sequence: S, index: int) -> str | None:
        """Draw the token after an accepted draft and return its text; None without such a draft.

        To be called after `sample`, with the same index.
        """
        if sequence.draft is None:
            return None
        sequence.cached.append(sequence.draft)
        sequence.draft = None
        return self._draw(sequence, index + 1)  # the draft is the next row of the batch

    def logits(self, tokens: Sequence[int], start: int = 0) -> Iterator[Array]:
        """Yield the float32 logits (vocab_size) after each of `tokens[start:]`.

        Before `start`, cells that a call before has left are used again. No sequence may be in use.
        """
        sequence = self._sequences[0]
        shared = self._usable(sequence, list(tokens[:start]))
        self._truncate(sequence, shared)
        for first in range(shared, len(tokens), _PREFILL_CHUNK):
            chunk = tokens[first : first + _PREFILL_CHUNK]
            rows = [BatchRow(0, n, token, logits=True) for n, token in enumerate(chunk, first)]
            indices = self._decode_rows(rows)
            sequence.cached += chunk
            for row, index in zip(rows, indices, strict=True):
                if row.position >= start:
                    yield self._row(index).copy()

    def _usable(self, sequence: S, prompt: list[int]) -> int:
        """Return how many cached tokens of a sequence a prompt can use."""
        shared = common_prefix_length(sequence.cached, prompt)
        return 0 if self._model.has_state and shared < len(sequence.cached) else shared

    def _truncate(self, sequence: S, tokens: int) -> None:
        """Remove the cells behind the first `tokens` of a sequence.

        Raises:
            RuntimeError: the model has a state, from which llama.cpp cannot remove them.
        """
        if not self._api.llama_memory_seq_rm(self._memory, sequence.id, tokens, -1):
            raise RuntimeError(f"llama.cpp cannot go back to token {tokens} of a sequence")
        del sequence.cached[tokens:]

    def _copy(self, source: S, target: S) -> None:
        """Replace the cells of `target` by a copy of those of `source`."""
        self.clear(target)
        self._api.llama_memory_seq_cp(self._memory, source.id, target.id, 0, -1)
        target.cached = list(source.cached)

    def _drop_draft(self, sequence: S) -> None:
        """Remove a draft token from the cache."""
        self._api.llama_memory_seq_rm(self._memory, sequence.id, len(sequence.cached), -1)
        sequence.draft = None

    def _draw(self, sequence: S, index: int) -> str:
        """Sample a token at a batch index, and update the state of the answer."""
        return self._accept(sequence, index, self._draw_token(sequence, index))

    def _draw_token(self, sequence: S, index: int) -> int | None:
        """Return a token drawn at a batch index; None if no token is allowed."""
        assert sequence.sampler is not None
        return sequence.sampler.sample(self._context, index, self._model.vocab_size)

    def _accept(self, sequence: S, index: int, token: int | None) -> str:
        """Update the state of the answer by a drawn token, and return its text."""
        request, decoder = sequence.request, sequence.decoder
        assert request is not None and decoder is not None
        if token is None:
            sequence.pending, sequence.finish = [], "length"
            return decoder.decode(b"", final=True)
        ended = self._model.is_eog(token)
        if request.sampler.logprobs is not None:
            sequence.logprob = (
                None if ended else self._logprob(token, index, request.sampler.logprobs)
            )
        piece = decoder.decode(b"" if ended else self._model.token_to_piece(token), ended)
        sequence.tokens += 1
        sequence.text += piece
        sequence.pending = []
        if ended:
            sequence.finish = "stop"
        elif request.stop_when and request.stop_when(sequence.text):
            sequence.finish = "stop_when"
        elif sequence.tokens >= request.max_tokens:
            sequence.finish = "length"
        else:
            sequence.pending = [token]
            if self._drafter:
                self._drafter.learn(sequence.cached, token)
        return piece

    def _logprob(self, token: int, index: int, top: int) -> TokenLogprob:
        """Return the log-probability of a token, and of the `top` most likely ones."""
        log_probs = log_softmax(self._row(index))
        likely = np.argsort(-log_probs, kind="stable")[:top]
        entries = [(n, float(log_probs[n])) for n in (token, *map(int, likely))]
        (text, logprob), *others = [
            (self._model.token_to_piece(n, special=True), logprob) for n, logprob in entries
        ]
        return TokenLogprob(text, logprob, tuple(others))

    def _row(self, index: int) -> Array:
        """Return the logits (vocab_size) of a row of the batch, valid until the next batch."""
        pointer = self._api.llama_get_logits_ith(self._context, index)
        row: Array = np.ctypeslib.as_array(pointer, (self._model.vocab_size,))
        return row

    def _decode_rows(self, rows: Sequence[BatchRow]) -> list[int]:
        """Decode `rows`, ordered by sequence, with their padding; return their batch indices."""
        builder = BatchBuilder(
            [len(s.cached) for s in self._sequences],
            exact=self._exact,
            max_gap=0 if self._model.has_state else self._max_gap,
        )
        builder.add_rows(rows)
        batch = self._batch
        batch.n_tokens = len(builder.rows)
        for n, row in enumerate(builder.rows):
            batch.token[n], batch.pos[n], batch.logits[n] = row.token, row.position, row.logits
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row.sequence
        status = CALLERS.decode(self._api, self._context, batch, self._threads)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(builder.rows)} tokens")
        for row in builder.padding:
            if not self._api.llama_memory_seq_rm(self._memory, row.sequence, row.position, -1):
                raise RuntimeError("llama.cpp cannot remove a padding token")
        return builder.indices


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens are equal.

    Bisection over slices, which compare about a hundred times as fast as tokens in a loop.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        equal = first[low:middle] == second[low:middle]
        low, high = (middle, high) if equal else (low, middle - 1)
    return low
