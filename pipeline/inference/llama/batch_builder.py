"""Builds the rows of one `llama_decode` call: the requested tokens, and the padding around them.

Padding tokens are decoded and removed from the KV cache at once. `context.py` gives the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MAX_GAP = 2
"""Idle sequences between two busy ones that are padded on a CPU: cheaper than a second pass."""


class BatchRow(NamedTuple):
    """A token of a `llama_batch`. `logits` requests the prediction of the token after it."""

    sequence: int
    position: int
    token: int
    logits: bool


class BatchBuilder:
    """The rows of one batch. `indices` are those of the requested rows, `padding` all others.

    `cached_tokens` has the number of filled KV cells of each sequence, by sequence id. `exact` pads
    sequences that would have one row only, for batch-invariant results. Up to `max_gap` idle
    sequences between two busy ones are padded.
    """

    def __init__(
        self, cached_tokens: Sequence[int], *, exact: bool, max_gap: int = MAX_GAP
    ) -> None:
        self.rows: list[BatchRow] = []
        self.indices: list[int] = []
        self.padding: list[BatchRow] = []
        self._cached_tokens, self._exact, self._max_gap = cached_tokens, exact, max_gap

    def add_rows(self, rows: Sequence[BatchRow]) -> None:
        """Add rows, ordered by sequence and position, each followed by its padding."""
        rows_of = Counter(row.sequence for row in rows)
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            self.add_row(row)
            if self._exact and rows_of[row.sequence] == 1:
                self.pad_single(row)
            if following:
                self.fill_gap(row, following.sequence)

    def add_row(self, row: BatchRow) -> None:
        """Add a requested row."""
        self.indices.append(len(self.rows))
        self.rows.append(row)

    def pad_single(self, row: BatchRow) -> None:
        """Add a padding token behind the only row of a sequence.

        A product with one row uses another kernel than one with several, and rounds differently.
        """
        self._pad(row.sequence, row.position + 1, row.token)

    def fill_gap(self, row: BatchRow, next_sequence: int) -> None:
        """Add padding to the idle sequences between `row` and `next_sequence`, if they are few.

        llama.cpp splits a batch where sequence ids are not consecutive, and decodes each part in a
        pass of its own. In exact mode an idle sequence gets two tokens, as any other.
        """
        gap = range(row.sequence + 1, next_sequence)
        if len(gap) > self._max_gap:
            return
        for sequence in gap:
            first = self._cached_tokens[sequence]
            for position in range(first, first + (2 if self._exact else 1)):
                self._pad(sequence, position, row.token)

    def _pad(self, sequence: int, position: int, token: int) -> None:
        padding = BatchRow(sequence, position, token, logits=False)
        self.rows.append(padding)
        self.padding.append(padding)
