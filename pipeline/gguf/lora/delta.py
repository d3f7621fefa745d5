"""What an adapter does to one tensor: a change that is added, or values that replace it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, RowOrder
from pipeline.gguf.huggingface.safetensors import SafetensorsTensor
from pipeline.gguf.lora.settings import Init

_ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs), `b` (outputs,
    rank).

    A DoRA (Liu et al. 2024, section 4.1) then gives each row of the sum the length in `magnitude`
    (outputs). `order` has the row of `b` for each row of the matrix, `columns` the column of `a`
    for each of its columns; None where they are the same.
    For an `embedding`, whose outputs are its columns, PEFT stores `a.T` as B and `b.T` as A.
    `init` is what was done to the matrix before training, see `residual`."""

    a: SafetensorsTensor
    b: SafetensorsTensor
    scale: float
    magnitude: SafetensorsTensor | None = None
    order: RowOrder | None = None
    columns: RowOrder | None = None
    embedding: bool = False
    init: Init = "plain"

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs); of an embedding (tokens, width)."""
        if self.embedding:
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.a.shape[0]

    def factors(self, first: int, last: int) -> tuple[Array, Array]:
        """Return `a`, and some rows of `b`.

        Raises:
            GattError: they hold NaN or infinity.
        """
        rows = self._adapter_rows(first, last)
        if self.embedding:
            a, b = self.b.load(_ALL).T, self.a.load(_ALL).T[rows]
        else:
            a, b = self.a.load(_ALL), self.b.load(rows)
        if self.columns is not None:
            a = np.ascontiguousarray(a[:, self.columns])
        if not (np.isfinite(a.sum()) and np.isfinite(b.sum())):
            raise GattError(
                f"{self.a.file}: the adapter holds NaN or infinity. "
                "Train again with a lower train.learning_rate."
            )
        return a, b

    def change(self, weights: Array, first: int, last: int) -> Array:
        """Return what is added to some rows of the matrix, `weights` (rows, inputs), in float32."""
        a, b = self.factors(first, last)
        change: Array = np.matmul(b * np.float32(self.scale), a)
        if self.magnitude is None:
            return change
        total = weights + change
        magnitude = self.magnitude.load(_ALL)[0][self._adapter_rows(first, last)]
        lengths = magnitude / np.linalg.norm(total, axis=1)
        scaled: Array = total * lengths[:, None] - weights
        return scaled

    def residual(self, weights: Array) -> Array:
        """Return what training had in place of the base's matrix `weights` (outputs, inputs).

        PiSSA (Meng et al. 2024, section 3) takes the principal components out of it, OLoRA
        (Büyükakyüz 2024, section 3) its projection onto the first columns. The order of the rows
        does not matter to either."""
        if self.init == "pissa":
            u, s, vt = np.linalg.svd(weights, full_matrices=False)
            principal: Array = (u[:, : self.rank] * s[: self.rank]) @ vt[: self.rank]
            return weights - principal
        if self.init == "olora":
            q, _ = np.linalg.qr(weights[:, : self.rank])
            projection: Array = q @ (q.T @ weights)
            return weights - np.float32(self.scale) * projection
        return weights

    def _adapter_rows(self, first: int, last: int) -> slice | RowOrder:
        return slice(first, last) if self.order is None else self.order[first:last]


@dataclass(frozen=True, slots=True)
class Replacement:
    """Values that take the place of a tensor, or of its rows `indices` if there are any.

    PEFT saves them for `modules_to_save`, `bias`, `trainable_token_indices` and a vocabulary of
    another size.
    """

    values: SafetensorsTensor
    indices: tuple[int, ...] = ()

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows; a vector is one row.

        Raises:
            GattError: they hold NaN or infinity.
        """
        values = self.values.load(rows)
        if not np.isfinite(values.sum()):
            raise GattError(
                f"{self.values.file}: the adapter holds NaN or infinity. Save it again."
            )
        return values

    def for_rows(self, rows: int) -> Replacement:
        """Return the replacement for a vocabulary of `rows`.

        Where training cut it to the tokens that exist, the other rows stay."""
        count = self.values.shape[0]
        if self.indices or count >= rows:
            return self
        return Replacement(self.values, tuple(range(count)))

    def patch(self, weights: Array, first: int) -> Array:
        """Return `weights`, the rows from `first` on, with those of `indices` replaced."""
        positions = np.asarray(self.indices) - first
        inside = np.flatnonzero((positions >= 0) & (positions < len(weights)))
        if not inside.size:
            return weights
        patched = weights.copy()
        patched[positions[inside]] = self.load(inside)
        return patched
