"""Weights that bitsandbytes quantized to 4 bits (NF4, FP4) or 8 bits, as transformers saves them.

A 4-bit matrix is stored row by row, two values a byte, the first in the upper half. Each block of
64 values is a code of the table `quant_map` times the block's `absmax`. With double quantization
`absmax` is a code as well: `nested_quant_map[absmax] * nested_absmax + nested_offset`, in blocks of
256. Source: `QuantState` and `dequantize_4bit` of bitsandbytes 0.50 (`functional.py`); the result
has their rounding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Bytes, JsonObject, RowOrder
from pipeline.gguf.huggingface.safetensors import GGML_TYPES, SafetensorsTensor, Weights

_STATE = ".quant_state.bitsandbytes__"
_TABLES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INT8_COMPANIONS = (".SCB", ".weight_format")
_INT8_SCALE = np.float32(1 / 127)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class _NestedScales(NamedTuple):
    """The tables of `absmax` that is quantized to 8 bits itself."""

    codes: Array
    scales: Array
    offset: np.float32
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitTensor:
    """A matrix in 4 bits. `dtype` is the type that it was rounded from, and is rounded to.

    `scales` has a float32 for each `block` values, or 8-bit codes where they are `nested`.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    packed: Bytes
    codes: Array
    scales: Array | Bytes
    block: int
    nested: _NestedScales | None

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows."""
        columns = self.shape[-1]
        numbers = np.arange(math.prod(self.shape[:-1]))[rows]
        packed = self.packed.reshape(-1, columns // 2)[numbers]
        values = np.empty((len(numbers), columns), np.float32)
        values[:, ::2], values[:, 1::2] = self.codes[packed >> 4], self.codes[packed & 15]
        if columns % self.block == 0:
            per_row = columns // self.block
            blocks = numbers[:, None] * per_row + np.arange(per_row)
            by_block = values.reshape(len(numbers), per_row, self.block)
            by_block *= self._scales(blocks)[:, :, None]
        else:
            values *= self._scales((numbers[:, None] * columns + np.arange(columns)) // self.block)
        return _rounded(values, self.dtype)

    def _scales(self, blocks: RowOrder) -> Array:
        """Return the largest absolute values of some blocks."""
        scales = self.scales[blocks]
        if self.nested is None:
            return scales.astype(np.float32)
        # In two roundings, as bitsandbytes: first the product, then the sum.
        codes, outer, offset, block = self.nested
        products: Array = codes[scales] * outer[blocks // block]
        return products + offset


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBitTensor:
    """A matrix in 8 bits (LLM.int8()): `values` times the row's `scales`, divided by 127."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    values: Bytes
    scales: Array

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows."""
        stored = self.values.view(np.int8).reshape(self.shape)[rows]
        values: Array = stored * self.scales[rows, None] * _INT8_SCALE
        return _rounded(values, self.dtype)


def dequantized(tensors: dict[str, SafetensorsTensor], dtype: str) -> dict[str, Weights]:
    """Return the tensors of a checkpoint without the tables of bitsandbytes.

    `dtype` is the type of the model in PyTorch's words, for matrices that do not say theirs.

    Raises:
        GattError: a table is missing or damaged.
    """
    weights: dict[str, Weights] = {}
    for key, stored in tensors.items():
        if _STATE in key or key.endswith((*_TABLES, *_INT8_COMPANIONS)):
            continue
        weights[key] = stored
        if stored.dtype in GGML_TYPES and f"{key}.absmax" not in tensors:
            continue
        scb = tensors.get(f"{key.removesuffix('.weight')}.SCB")
        try:
            weights[key] = (
                EightBitTensor(
                    file=stored.file,
                    dtype=_DTYPES.get(dtype, "BF16"),
                    shape=stored.shape,
                    values=np.asarray(stored.data),
                    scales=_floats(scb),
                )
                if scb
                else _four_bit(key, tensors)
            )
        except (KeyError, ValueError, TypeError) as error:
            raise GattError(
                f"{stored.file}: {key} is stored in {8 if scb else 4} bits, but its tables are "
                f"incomplete ({error} is missing or damaged). Download the checkpoint again, or "
                "take the 16-bit model."
            ) from error
    return weights


def _four_bit(key: str, tensors: dict[str, SafetensorsTensor]) -> FourBitTensor:
    state_key = next((name for name in tensors if name.startswith(key + _STATE)), None)
    if state_key is None:
        raise KeyError(key + _STATE)
    state: JsonObject = json.loads(np.asarray(tensors[state_key].data).tobytes())
    shape, block, absmax = tuple(state["shape"]), int(state["blocksize"]), tensors[f"{key}.absmax"]
    packed = np.asarray(tensors[key].data)
    if shape[-1] % 2 or packed.size * 2 != math.prod(shape):
        raise ValueError(f"the shape {shape}")
    if math.prod(absmax.shape) != -(-math.prod(shape) // block):
        raise ValueError(f"{key}.absmax")
    nested = None
    if "nested_blocksize" in state:
        nested = _NestedScales(
            _floats(tensors[f"{key}.nested_quant_map"]),
            _floats(tensors[f"{key}.nested_absmax"]),
            np.float32(state["nested_offset"]),
            int(state["nested_blocksize"]),
        )
    return FourBitTensor(
        file=tensors[key].file,
        dtype=_DTYPES[state["dtype"]],
        shape=shape,
        packed=packed,
        codes=_floats(tensors[f"{key}.quant_map"]),
        scales=np.asarray(absmax.data) if nested else _floats(absmax),
        block=block,
        nested=nested,
    )


def _floats(stored: SafetensorsTensor) -> Array:
    return stored.load(slice(None)).reshape(-1)


def _rounded(values: Array, dtype: str) -> Array:
    if dtype == "F32":
        return values
    kind = GGML_TYPES[dtype]
    return ggml.dequantize(ggml.quantize(values, kind), kind, values.shape[-1])
