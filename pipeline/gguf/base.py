"""What a merge starts from: hyperparameters, vocabulary and weights of a base model in any file
format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import GGUFWriter

Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
RowOrder = npt.NDArray[np.intp]
JsonObject = dict[str, Any]
Metadata = dict[str, object]
"""What a file says about itself, by the fields of `gguf.Metadata`."""
CUT_TO_TOKENS = ("gemma3", "gemma4")
"""Architectures whose embedding a GGUF stores without the rows that no token has."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight by its GGUF name.

    `load(first, last)` reads some of its rows as float32, (rows, columns), in llama.cpp's order.
    The matrices of experts follow one another, and a vector is one row."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[int, int], Array]

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return math.prod(self.shape[:-1])


class LinearHeads(NamedTuple):
    """The heads of linear attention (gated delta net): some value heads share a key head.

    Hugging Face stores the value heads of a key head side by side. In a GGUF the first ones of all
    key heads come first, then the second ones."""

    keys: int
    values: int
    key_size: int
    value_size: int

    def order(self, part: str, size: int) -> RowOrder | None:
        """Return which row of a Hugging Face tensor each of `size` rows of the part of a layer is.

        Of the output matrix, they are its columns. None where the orders are the same.
        """
        if part not in _BY_VALUE_HEAD or self.keys == self.values:
            return None
        width = 1 if part in _ONE_ROW_EACH else self.value_size
        first = size - self.values * width  # queries and keys stand before the values
        grouped = np.arange(first, size).reshape(self.keys, self.values // self.keys, width)
        return np.concatenate([np.arange(first), grouped.swapaxes(0, 1).reshape(-1)])


_ONE_ROW_EACH = ("ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt")
_BY_COLUMN = "ssm_out"
_BY_VALUE_HEAD = (*_ONE_ROW_EACH, "attn_qkv", "attn_gate", "ssm_conv1d", _BY_COLUMN)
"""Parts of a layer that have one or more rows (or columns) for each value head."""


class BaseFamily(Protocol):
    """What a base model's family says about its weights."""

    @property
    def norm_shift(self) -> float:
        """What llama.cpp adds to the weights of norms."""

    @property
    def without_head(self) -> bool:
        """Whether llama.cpp has no output matrix for it."""


class Base(Protocol):
    """A base model of a supported architecture.

    Where it is `interleaved`, the rows of q and k stand in llama.cpp's rotary order.
    `linear_heads` are those of its layers with linear attention, if it has such.
    """

    name: str
    architecture: str
    layers: int
    heads: int
    key_heads: int
    interleaved: bool
    linear_heads: LinearHeads | None

    @property
    def family(self) -> BaseFamily:
        """What its family says about its values."""

    def write_fields(self, writer: GGUFWriter, metadata: Metadata) -> None:
        """Write every key but architecture and file type; `metadata` replaces the base's own."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight once."""


def row_order(base: Base, name: str, rows: int) -> RowOrder | None:
    """Return which row of a Hugging Face matrix each row of the GGUF tensor `name` is.

    Hugging Face stores the rows of q and k in halves, llama.cpp's rotary order in pairs. None where
    the orders are the same.
    """
    part = _part(name)
    if base.linear_heads and part != _BY_COLUMN:
        return base.linear_heads.order(part, rows)
    heads = {"attn_q": base.heads, "attn_k": base.key_heads}.get(part, 0)
    if not (base.interleaved and heads):
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def column_order(base: Base, name: str, columns: int) -> RowOrder | None:
    """Return which column of a Hugging Face matrix each column of the GGUF tensor `name` is.

    None where the orders are the same.
    """
    if base.linear_heads and _part(name) == _BY_COLUMN:
        return base.linear_heads.order(_BY_COLUMN, columns)
    return None


def _part(name: str) -> str:
    """Return what a GGUF tensor is within its layer ("attn_q"), or ""."""
    return name.split(".")[2] if name.startswith("blk.") else ""
