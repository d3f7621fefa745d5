"""A context for a GPU: prompts and answers of all sequences in one batch.

A GPU is fast where a batch has hundreds of tokens, and no GPU is batch-invariant. So a batch has
the next token of every answer that is being generated and, up to `batch_tokens`, the prompts of
other sequences. There are no padding and draft tokens, but for idle sequences between busy ones:
llama.cpp decodes a batch in passes in which consecutive sequences have equally many tokens, and
would take one more.

Tokens are drawn in several threads: llama.cpp's samplers release Python's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from pipeline.inference.llama.batch_builder import BatchRow
from pipeline.inference.llama.context import BatchContext, S
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.system import core_count

_MIN_TOKENS_PER_THREAD = 4
"""Drawing a token takes about 0.1 ms, and starting work in a thread a tenth of that."""


class MixedBatchContext(BatchContext[S]):
    """A `BatchContext` that decodes up to `settings.batch_tokens` of any sequences at a time.

    Raises:
        GattError: too little memory, or an adapter of another base.
    """

    def __init__(
        self, model: LoadedModel, sequences: list[S], settings: ContextSettings, threads: int
    ) -> None:
        super().__init__(model, sequences, settings, threads, exact=False)
        self._batch_tokens = settings.batch_tokens
        self._max_gap = len(sequences)

    def step(self, sequences: Sequence[S]) -> list[tuple[S, str]]:
        """Decode pending tokens in one batch; return the sequences that drew a token, and its text.

        Each sequence has at least one row. Prompts fill the rest of the batch in the order of
        `sequences`.
        """
        # The idle sequences between these get a row, too.
        room = self._batch_tokens - max(s.id for s in sequences) - 1
        counts = {}
        for sequence in sequences:
            more = min(len(sequence.pending) - 1, room)
            counts[sequence.id] = 1 + more
            room -= more
        ordered = sorted(sequences, key=lambda s: s.id)
        rows, ready = [], []
        for sequence in ordered:
            first, count = len(sequence.cached), counts[sequence.id]
            chunk, sequence.pending = sequence.pending[:count], sequence.pending[count:]
            rows += [BatchRow(sequence.id, first + n, t, logits=False) for n, t in enumerate(chunk)]
            sequence.cached += chunk
            if not sequence.pending:
                rows[-1] = rows[-1]._replace(logits=True)
                ready.append((sequence, len(rows) - 1))
        indices = self._decode_rows(rows)
        draws = [(sequence, indices[row]) for sequence, row in ready]
        tokens = self._draw_tokens(draws)
        return [
            (sequence, self._accept(sequence, index, token))
            for (sequence, index), token in zip(draws, tokens, strict=True)
        ]

    def _draw_tokens(self, draws: Sequence[tuple[S, int]]) -> list[int | None]:
        """Draw a token for each sequence from a row of the batch, in parallel."""
        tokens: list[int | None] = [None] * len(draws)
        threads = min(core_count(), len(draws) // _MIN_TOKENS_PER_THREAD) or 1

        def draw(first: int) -> None:
            for n in range(first, len(draws), threads):
                tokens[n] = self._draw_token(*draws[n])

        if threads == 1:
            draw(0)
        else:
            # Waits for the GPU and sorts the rows once; after that, reading them is thread-safe.
            self._api.llama_get_logits(self._context)
            list(_sampling_pool().map(draw, range(threads)))
        return tokens


@cache
def _sampling_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(core_count(), "gatt sample")
