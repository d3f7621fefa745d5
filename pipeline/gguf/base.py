"""What a merge starts from: hyperparameters, vocabulary and weights of a base model in any file
format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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


class Base(Protocol):
    """A base model of a supported architecture.

    Where it is `interleaved`, the rows of q and k stand in llama.cpp's rotary order.
    """

    name: str
    architecture: str
    layers: int
    heads: int
    key_heads: int
    interleaved: bool

    def write_fields(self, writer: GGUFWriter, metadata: Metadata) -> None:
        """Write every key but architecture and file type; `metadata` replaces the base's own."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight once."""


def row_order(base: Base, name: str, rows: int) -> RowOrder | None:
    """Return which row of a Hugging Face matrix each row of the GGUF tensor `name` is.

    Hugging Face stores the rows of q and k in halves, llama.cpp's rotary order in pairs. None where
    the orders are the same.
    """
    parts = name.split(".")
    heads_of = {"attn_q": base.heads, "attn_k": base.key_heads}
    heads = heads_of.get(parts[-2], 0) if len(parts) > 1 else 0
    if not (base.interleaved and heads):
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
