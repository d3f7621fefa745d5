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
    """A base model of a known architecture; `interleaved`: the rows of q and k stand in llama.cpp's rotary order."""

    name: str
    architecture: str
    layers: int
    heads: int
    key_heads: int
    interleaved: bool

    def write_fields(self, writer: Any) -> None:
        """Every key of the GGUF but its architecture and file type."""

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, once."""
