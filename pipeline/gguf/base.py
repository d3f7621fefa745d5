"""What a merge starts from: hyperparameters, vocabulary and weights of a base model, whatever file they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight by its GGUF name. `load` reads it as float32, in llama.cpp's order of rows."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


class Base(Protocol):
    """A base model of a known architecture."""

    name: str
    architecture: str
    layers: int
    heads: int
    key_heads: int

    def write_fields(self, writer: Any) -> None:
        """Every key of the GGUF but its architecture and file type."""

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, once."""


def permute(rows: Array, heads: int) -> Array:
    """Reorder the rows of a q or k matrix from halves (Hugging Face) to interleaved pairs (llama.cpp's rotary order)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
