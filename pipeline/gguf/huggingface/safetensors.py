"""The tensors of a checkpoint's safetensors files, memory-mapped and never loaded as one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Bytes, RowOrder
from pipeline.gguf.huggingface.config import require_object

GGML_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
"""The supported types of safetensors, and ggml's numbers of them."""
INTEGERS = ("I64", "I32", "BOOL")
"""Types of tables that some families store beside their weights (Qwen4-Exp)."""
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
_POINTER = b"version https://git-lfs"


class Weights(Protocol):
    """A tensor of a checkpoint: `file`, safetensors' name of its type, and its shape."""

    @property
    def file(self) -> Path:
        """The file that holds it."""

    @property
    def dtype(self) -> str:
        """The type of its values ("BF16")."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as in PyTorch."""

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows; a vector is one row."""


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor of a safetensors file, with its bytes in the mapped file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows; a vector is one row.

        Raises:
            GattError: a type other than F32, F16 or BF16.
        """
        if self.dtype not in GGML_TYPES:
            raise GattError(
                f"{self.file}: weights of type {self.dtype} found; F32, F16 or BF16 expected."
            )
        kind, columns = GGML_TYPES[self.dtype], self.shape[-1] if self.shape else 1
        stored = np.asarray(self.data).reshape(-1, ggml.row_bytes(kind, columns))
        return ggml.dequantize(stored[rows], kind, columns)


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Raises:
        GattError: one is missing, or the weights are a pickle.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = require_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise GattError(f"{index} has no weight_map. Download the checkpoint again.")
        names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        advice = (
            f"{pickled.name} is a pickle, which may run code: save it as safetensors."
            if pickled
            else "Download it again."
        )
        raise GattError(f"{folder} lacks {missing[0]}. {advice}")
    return [folder / name for name in names]


def open_safetensors(file: Path) -> dict[str, SafetensorsTensor]:
    """Map every tensor of a safetensors file: a length, a JSON header, then the data.

    Raises:
        GattError: the file is damaged or truncated.
    """
    size = file.stat().st_size
    if size < 8:
        raise GattError(f"{file} has {size} bytes: no weights. Download the checkpoint again.")
    raw = np.memmap(file, np.uint8, "r")
    if raw[: len(_POINTER)].tobytes() == _POINTER:
        raise GattError(f"{file} is a pointer of Git LFS, not the weights. Run `git lfs pull`.")
    data_start = 8 + int(raw[:8].view("<u8")[0])
    try:
        if data_start > size:
            raise ValueError(f"a header of {data_start:,} bytes in a file of {size:,}")
        header = dict(json.loads(raw[8:data_start].tobytes()))
        header.pop("__metadata__", None)
        tensors = {key: _tensor(file, raw, data_start, entry) for key, entry in header.items()}
    # What damage leads to; JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GattError(
            f"{file} is not a safetensors file, or a damaged one ({error}). "
            "Download the checkpoint again."
        ) from error
    return tensors


def _tensor(file: Path, raw: Bytes, data_start: int, entry: dict[str, object]) -> SafetensorsTensor:
    """Return a tensor by its entry in the header.

    Raises:
        GattError: its bytes go beyond the end of the file.
        ValueError: the entry contradicts itself.
    """
    dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError("a tensor without a shape or offsets")
    first, last = (data_start + int(offset) for offset in offsets)
    if last > raw.size:
        raise GattError(
            f"{file} is cut short: {raw.size:,} bytes found, at least {last:,} expected. "
            "Download the checkpoint again."
        )
    item_bytes = _ITEM_BYTES.get(dtype)
    if item_bytes and last - first != math.prod(shape) * item_bytes:
        raise ValueError(f"{last - first:,} bytes for a {dtype} tensor of shape {shape}")
    return SafetensorsTensor(file, dtype, tuple(shape), raw[first:last])
