"""What a merge starts from: hyperparameters, vocabulary and weights of a base model, whatever file they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight by its GGUF name.

    `load(first, last)` reads some of its rows as float32, (rows, columns), in llama.cpp's order; the matrices of experts
    follow one another, and a vector is one row.
    """

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
    """A base model of a known architecture; `interleaved`: the rows of q and k stand in llama.cpp's rotary order."""

    name: str
    architecture: str
    layers: int
    heads: int
    key_heads: int
    interleaved: bool

    def write_fields(self, writer: Any, about: dict[str, Any]) -> None:
        """Every key of the GGUF but its architecture and file type; `about` replaces what the base says of itself."""

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, once."""


def row_order(base: Base, name: str, rows: int) -> npt.NDArray[np.intp] | None:
    """Which row of a Hugging Face matrix each row of the GGUF tensor `name` is; None where they are the same.

    The rows of q and k stand in halves there, and in pairs in llama.cpp's rotary order.
    """
    parts = name.split(".")
    heads = {"attn_q": base.heads, "attn_k": base.key_heads}.get(
        parts[-2] if len(parts) > 1 else "", 0
    )
    if not (base.interleaved and heads):
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
