"""Bindings to the ggml library inside llama-cpp-python: quantizers, and access to the tensors of a
graph.

Source: `ggml.h` of llama-cpp-python 0.3.36. llama_cpp itself is not imported. The functions release
Python's lock and may run in several threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import GattError
from pipeline.gguf.base import Array, Bytes

_FLOATS = ctypes.POINTER(ctypes.c_float)
_LIBRARY_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")
_F32 = 0
Number = TypeVar("Number", np.float32, np.int32)


class Node(ctypes.Structure):
    """`struct ggml_tensor`: a tensor of a graph."""


Node._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOATS, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    """Load the shared library of llama-cpp-python.

    Raises:
        GattError: it is not installed.
    """
    package = importlib.util.find_spec("llama_cpp")
    folder = Path(package.origin).parent / "lib" if package and package.origin else Path()
    file = next((folder / name for name in _LIBRARY_NAMES if (folder / name).exists()), None)
    if file is None:
        raise GattError(
            "llama-cpp-python is incomplete: its library ggml-base is missing. Install it again."
        )
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        _FLOATS,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        _FLOATS,
    ]
    library.ggml_op_name.restype = ctypes.c_char_p
    library.ggml_op_name.argtypes = [ctypes.c_int]
    library.ggml_nbytes.restype = ctypes.c_size_t
    library.ggml_nbytes.argtypes = [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def row_bytes(kind: int, columns: int) -> int:
    """Return the bytes of a row of `columns` weights in the ggml type `kind`.

    Raises:
        ValueError: no such type, or a row that is not a multiple of its block (ggml would abort).
    """
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if columns % block:
        raise ValueError(f"a row of {columns} weights is not a multiple of a block of {block}")
    return int(columns // block * size)


def quantize(rows: Array, kind: int, importance: Array | None = None) -> Bytes:
    """Return `rows` (rows, columns) in the ggml type `kind`: (rows, bytes).

    `importance` (columns) weights the rounding errors.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    count, columns = rows.shape
    stored = np.empty((count, row_bytes(kind, columns)), np.uint8)
    weights = None if importance is None else importance.ctypes.data_as(_FLOATS)
    _library().ggml_quantize_chunk(
        kind, rows.ctypes.data_as(_FLOATS), stored.ctypes.data, 0, count, columns, weights
    )
    return stored


def dequantize(stored: Bytes, kind: int, columns: int) -> Array:
    """Return (rows, columns) float32 of (rows, bytes) in the ggml type `kind`."""
    stored = np.ascontiguousarray(stored)
    if kind == _F32:  # ggml has no function for it
        return np.array(stored.view(np.float32))
    rows = np.empty((len(stored), columns), np.float32)
    traits = _library().ggml_get_type_traits(kind).contents
    traits.to_float(stored.ctypes.data, rows.ctypes.data_as(_FLOATS), rows.size)
    return rows


@cache
def operation(number: int) -> str:
    """Return the name of a graph's operation ("MUL_MAT")."""
    return str(_library().ggml_op_name(number).decode())


def read_node(node: Node, kind: type[Number]) -> npt.NDArray[Number]:
    """Return a graph's tensor from whatever device holds it, with the axes in NumPy's order."""
    address = ctypes.addressof(node)
    raw = np.empty(_library().ggml_nbytes(address), np.uint8)
    _library().ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    shape = tuple(reversed(node.ne))
    return np.lib.stride_tricks.as_strided(raw.view(kind), shape, tuple(reversed(node.nb)))
