"""llama.cpp's storage formats: their numbers, the tensor types of each, and quantization by llama.cpp itself."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

from pipeline.errors import GattError


def file_type(format_name: str) -> int:
    """llama.cpp's number of a format ("F16", "Q8_0", "Q4_K_M", "IQ3_XXS", ...).

    Raises:
        GattError: no such format.
    """
    import llama_cpp

    kind = getattr(
        llama_cpp, f"LLAMA_FTYPE_{'ALL' if format_name == 'F32' else 'MOSTLY'}_{format_name}", None
    )
    if kind is None:
        raise GattError(
            f"Unknown format {format_name!r}. Use llama.cpp's names, such as F16, Q8_0, Q5_K_M or Q4_K_M."
        )
    return int(kind)


def quantize(source: Path, target: Path, format_name: str) -> None:
    """Write a GGUF to `target` in another format by llama.cpp alone: for files that our own export cannot write.

    Raises:
        GattError: no such format, or llama.cpp refused.
    """
    import llama_cpp

    silence(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type(format_name), os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    ):
        raise GattError(
            f"llama.cpp could not quantize {source.name} to {format_name} (is the disk full?)."
        )


def query_tensor_types(skeleton: Path, format_name: str, importance: bool) -> dict[str, int]:
    """The ggml type that llama.cpp gives each tensor of a GGUF in `format_name`, with an importance matrix or without one.

    It is asked to quantize without doing it, and says for each tensor what it would do.

    Raises:
        GattError: no such format, or llama.cpp refuses.
    """
    import gguf
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run = file_type(format_name), True
    one = (ctypes.c_float * 1)(1.0)
    named = (llama_cpp.llama_model_imatrix_data * 2)((b"-", one, 1), (None, None, 0))
    if importance:
        params.imatrix = named
    said: list[str] = []
    listen = llama_cpp.llama_log_callback(
        lambda level, text, data: said.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    status = llama_cpp.llama_model_quantize(str(skeleton).encode(), b"", ctypes.byref(params))
    silence(llama_cpp)
    lines = re.findall(
        r"\[ *\d+/ *\d+\] +(\S+) .*?type = *\w+, size = .*?MiB(?: -> .*?MiB \((\w+)\))?",
        "".join(said),
    )
    if status or not lines:
        raise GattError(
            f"llama.cpp will not make {format_name} of this model: {''.join(said[-2:]).strip()}"
        )
    return {name: int(gguf.GGMLQuantizationType[(kind or "f32").upper()]) for name, kind in lines}


_quiet: list[Any] = []


def silence(llama_cpp: Any) -> None:
    """Send llama.cpp's own log nowhere; the callback must outlive the library's use of it."""
    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    llama_cpp.llama_log_set(_quiet[0], ctypes.c_void_p(0))
