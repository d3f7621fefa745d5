"""The graphics cards that this llama.cpp can use, and the memory that is free on them.

ggml's device registry has them, whatever they are programmed with (CUDA, Metal, Vulkan, ...).
llama-cpp-python has no bindings for it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from pipeline.gguf.formats import silence
from pipeline.system import GB, available_memory

_DEDICATED, _INTEGRATED = 1, 2
"""`ggml_backend_dev_type`; other devices are processors."""
_METAL = ("MTL", "Metal")
"""What the names of Apple's devices begin with: they share the computer's memory, too."""


class GpuDevice(NamedTuple):
    """A graphics card, or a GPU in the processor, and the bytes that are free on it."""

    name: str
    free_bytes: int


def gpu_devices() -> list[GpuDevice]:
    """Return the devices that llama.cpp offloads to; none if it was built for the CPU only.

    Weights and caches that are already there, of whatever program, do not count as free.
    """
    return _read_devices()


def _read_devices() -> list[GpuDevice]:
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return []
    silence(llama_cpp)  # CUDA reports its devices when it is first asked for them
    ggml, base = _libraries()
    devices = [ggml.ggml_backend_dev_get(n) for n in range(ggml.ggml_backend_dev_count())]
    by_type = [(base.ggml_backend_dev_type(device), device) for device in devices]
    dedicated = [device for kind, device in by_type if kind == _DEDICATED]
    integrated = [device for kind, device in by_type if kind == _INTEGRATED]
    # As llama.cpp does: the GPU in the processor only if there is no other.
    return [_describe(base, device) for device in dedicated or integrated[:1]]


def describe_gpus(devices: list[GpuDevice]) -> str:
    """Return the names of the devices."""
    return " + ".join(device.name for device in devices)


def free_vram(devices: list[GpuDevice]) -> int:
    """Return the bytes that are free on all devices: llama.cpp divides the layers among them."""
    return sum(device.free_bytes for device in devices)


def describe_offload() -> str:
    """Return whether llama.cpp runs on a GPU, and on which."""
    devices = gpu_devices()
    if not devices:
        return "works on the CPU"
    cards = (f"{device.name}, {device.free_bytes / GB:.1f} GB free" for device in devices)
    return f"works with GPU offload ({'; '.join(cards)})"


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Return ggml, which has the registry, and ggml-base, which has the devices' functions."""
    from llama_cpp import _ctypes_extensions, _ggml

    ggml: Any = _ggml.libggml
    base: Any = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    for function in (base.ggml_backend_dev_name, base.ggml_backend_dev_description):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    return ggml, base


def _describe(base: ctypes.CDLL, device: int) -> GpuDevice:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    name = base.ggml_backend_dev_name(device).decode(errors="replace")
    shares_memory = base.ggml_backend_dev_type(device) == _INTEGRATED or name.startswith(_METAL)
    free_bytes = min(free.value, available_memory()) if shares_memory else free.value
    description = base.ggml_backend_dev_description(device) or name.encode()
    return GpuDevice(description.decode(errors="replace"), free_bytes)
