"""llama.cpp's file types: their numbers, the ggml type of each tensor in them, quantization by
llama.cpp itself.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, Tensor
from pipeline.system import core_count

if TYPE_CHECKING:
    from pipeline.gguf.imatrix import ImportanceMatrix

KeyValue = str | bool | int
UNIFORM_FORMATS = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
}
"""The formats whose types follow from the tensor alone, and their names as file types.

For other formats llama.cpp chooses the type of each tensor.
"""
_EXACT = (".ffn_gate_inp.", ".shortconv.conv.", ".ssm_conv1d.")
"""Matrices that are never quantized: routers and convolutions."""
_QUANTIZED = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) .*?type = *\w+, size = .*?MiB(?: -> .*?MiB \((\w+)\))?"
)
"""A line of llama.cpp's log: the name of a tensor and, if it would be quantized, its new type."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a file stores its tensors: llama.cpp's number of the file type, and each tensor's ggml
    type.

    `importance` has the weights of a matrix's columns, one row per expert. `keys` tell their
    source."""

    file_type: int
    types: dict[str, int]
    importance: dict[str, Array] = field(default_factory=dict)
    keys: dict[str, KeyValue] = field(default_factory=dict)


def uniform_format(tensors: Sequence[Tensor], format_name: str) -> Format:
    """Return one of `UNIFORM_FORMATS` for these tensors, with the types of llama.cpp's converter.

    Vectors, norms, routers and convolutions stay F32.
    """
    import gguf

    types = {}
    for tensor in tensors:
        exact = tensor.name.endswith("_norm.weight") or any(p in tensor.name for p in _EXACT)
        if len(tensor.shape) < 2 or exact or not tensor.name.endswith(".weight"):
            kind = "F32"
        elif format_name == "Q8_0" and tensor.columns % 32:
            kind = "F16"
        else:
            kind = format_name
        types[tensor.name] = int(gguf.GGMLQuantizationType[kind])
    return Format(int(gguf.LlamaFileType[UNIFORM_FORMATS[format_name]]), types)


def file_type(format_name: str) -> int:
    """Return llama.cpp's number of a format ("F16", "Q8_0", "Q4_K_M", "IQ3_XXS", ...).

    Raises:
        GattError: no such format.
    """
    import llama_cpp

    prefix = "ALL" if format_name == "F32" else "MOSTLY"
    number = getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{format_name}", None)
    if number is None:
        raise GattError(
            f"Unknown format {format_name!r}. "
            "Use llama.cpp's names, such as F16, Q8_0, Q5_K_M or Q4_K_M."
        )
    return int(number)


def require_formats(names: Iterable[str]) -> None:
    """Check that llama.cpp has some formats, before any work is done.

    Raises:
        GattError: as `file_type`.
    """
    for name in names:
        file_type(name)


def quantize(
    source: Path, target: Path, format_name: str, importance: ImportanceMatrix | None = None
) -> None:
    """Write a GGUF in another format by llama.cpp alone, for files that our own export cannot
    write.

    Raises:
        GattError: no such format, or llama.cpp failed.
    """
    import llama_cpp

    silence(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type(format_name), core_count()
    by_tensor = importance.by_tensor() if importance else {}
    columns = {name: np.ascontiguousarray(values) for name, values in by_tensor.items()}
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        for name, values in columns.items()
    ]
    if entries:  # the list ends with an empty entry
        size = len(entries) + 1
        params.imatrix = (llama_cpp.llama_model_imatrix_data * size)(*entries, (None, None, 0))
    if llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    ):
        raise GattError(
            f"llama.cpp could not quantize {source.name} to {format_name}. "
            "Check the free disk space."
        )


def query_tensor_types(skeleton: Path, format_name: str, *, importance: bool) -> dict[str, int]:
    """Return the ggml type that llama.cpp gives each tensor of a GGUF in `format_name`.

    The choice depends on whether there is an importance matrix. llama.cpp has no function for it; a
    dry run of its quantization writes the types to the log.

    Raises:
        GattError: no such format, or llama.cpp failed.
    """
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run = file_type(format_name), True
    dummy = (ctypes.c_float * 1)(1.0)
    matrices = (llama_cpp.llama_model_imatrix_data * 2)((b"-", dummy, 1), (None, None, 0))
    if importance:
        params.imatrix = matrices
    messages: list[str] = []
    callback = llama_cpp.llama_log_callback(
        lambda level, text, data: messages.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    status = llama_cpp.llama_model_quantize(os.fsencode(skeleton), b"", ctypes.byref(params))
    silence(llama_cpp)
    choices = _QUANTIZED.findall("".join(messages))
    if status or not choices:
        reason = "".join(messages[-2:]).strip()
        raise GattError(f"llama.cpp cannot write {format_name} of this model: {reason}")
    return {name: int(gguf.GGMLQuantizationType[(kind or "f32").upper()]) for name, kind in choices}


_null_callback: list[object] = []


def silence(llama_cpp: ModuleType) -> None:
    """Discard llama.cpp's log; the callback must live as long as the library uses it."""
    if not _null_callback:
        _null_callback.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_null_callback[0], ctypes.c_void_p(0))
