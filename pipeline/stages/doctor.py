"""`gatt doctor`: this machine, the backends that work on it, and the base models it can train.

Each backend is tried, not only looked up.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil

from pipeline.console import print_result, print_table
from pipeline.gpu import (
    NvidiaGpu,
    compiler_problem,
    find_nvcc,
    pytorch_problem,
    query_nvidia_smi,
)
from pipeline.hub.models import shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.inference.batch_engine import system_info
from pipeline.recipe import Train
from pipeline.system import GB, available_memory, core_count
from pipeline.training.memory import (
    GPU_SIZES_GB,
    TOKENS_PER_DIALOGUE,
    TOKENS_PER_STEP,
    largest_preset,
    tokens_that_fit,
    training_memory,
    usable_bytes,
)
from pipeline.training.unsloth import check_nf4, free_memory, on_gpu

_COLUMNS = ("base model", "parameters", "GB on a CPU", "GB on a GPU", "GPU size", "tokens here")


def run(model: str = "") -> None:
    """Print the machine and every preset; with a `model`, only what training that one takes."""
    settings, gpu, free = Train(), on_gpu(), free_memory()
    if not model:
        _print_machine()
    print_result(
        f"\nMemory to train with rank {settings.rank}, with {TOKENS_PER_DIALOGUE} tokens at a time "
        f"(one dialogue) to {TOKENS_PER_STEP} (a step).\nMeasured on a CPU, estimated for a GPU. "
        f"The last column is for the {free / GB:.1f} GB that are free here.\n"
    )
    names = [model] if model else list(presets())
    print_table(
        _COLUMNS, [_row(name, shape_of(name), settings, free=free, gpu=gpu) for name in names]
    )
    if not model:
        largest = largest_preset(free, TOKENS_PER_DIALOGUE, settings, gpu=gpu) or "none"
        print_result(f"\nLargest model that this {'GPU' if gpu else 'CPU'} can train: {largest}")


def _row(
    name: str, shape: ModelShape, settings: Train, *, free: float, gpu: bool
) -> tuple[object, ...]:
    """Return the cells of `_COLUMNS` for one model; `free` is in bytes."""
    tokens = tokens_that_fit(shape, settings, free, gpu=gpu)
    return (
        name,
        f"{shape.parameters / 1e9:.2f} B",
        _memory_range(shape, settings, gpu=False),
        _memory_range(shape, settings, gpu=True),
        _smallest_gpu(shape, settings),
        tokens if tokens >= TOKENS_PER_DIALOGUE else "-",
    )


def _memory_range(shape: ModelShape, settings: Train, *, gpu: bool) -> str:
    low, high = (
        training_memory(shape, settings, tokens, gpu=gpu) / GB
        for tokens in (TOKENS_PER_DIALOGUE, TOKENS_PER_STEP)
    )
    return f"{low:.1f}–{high:.1f}"


def _smallest_gpu(shape: ModelShape, settings: Train) -> str:
    """Return the smallest of the common GPU sizes that trains a whole step at a time, or "-"."""
    needed = training_memory(shape, settings, TOKENS_PER_STEP, gpu=True)
    return next((f"{size} GB" for size in GPU_SIZES_GB if needed <= usable_bytes(size)), "-")


def _print_machine() -> None:
    gpu, cards = on_gpu(), query_nvidia_smi().gpus
    unsloth = "not installed; `python3 scripts/demo.py` installs it"
    if importlib.util.find_spec("unsloth"):
        unsloth = check_nf4("cuda" if gpu else "cpu")
    rows = [
        ("CPU", f"{platform.processor() or platform.machine()}, {core_count()} cores"),
        ("Memory", f"{available_memory() / GB:.1f} GB available"),
        ("Disk", f"{shutil.disk_usage('.').free / GB:.1f} GB free in this folder"),
        ("GPU", _gpu_text(_usable_gpus() if gpu else _listed_gpus(cards))),
        ("Unsloth", unsloth),
    ]
    if gpu or cards:
        rows.append(("Triton", _triton_text()))
    llama = llama_text(system_info(), has_nvidia_gpu=bool(cards), nvcc=find_nvcc())
    rows.append(("llama.cpp", llama))
    for name, text in rows:
        print_result(f"{name:<11}" + text.replace("\n", "\n" + " " * 11))


def _usable_gpus() -> list[str]:
    """Return a line for each device that PyTorch can use."""
    import torch

    lines = []
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        lines.append(f"{name}, {total / GB:.1f} GB, {free / GB:.1f} GB free")
    return lines


def _listed_gpus(cards: list[NvidiaGpu]) -> list[str]:
    """Return a line for each card that only the driver lists."""
    return [
        f"{card.name}, {card.total_bytes / GB:.1f} GB, {card.free_bytes / GB:.1f} GB free, "
        f"driver {card.driver}; PyTorch cannot use it"
        for card in cards
    ]


def _gpu_text(lines: list[str]) -> str:
    """Return a line for each card, and why PyTorch cannot use one that is there."""
    problem = pytorch_problem()
    return "\n".join([*(lines or ["none that PyTorch can use"]), *([problem] if problem else [])])


def _triton_text() -> str:
    """Return whether Triton is there and can compile; Unsloth's kernels are written in it."""
    if not importlib.util.find_spec("triton"):
        return "not installed. It comes with the CUDA build of PyTorch."
    problem = compiler_problem()
    return f"cannot compile: {problem}" if problem else "can compile (C compiler and Python.h)"


def llama_text(info: str, *, has_nvidia_gpu: bool, nvcc: str) -> str:
    """Return for what llama.cpp was built, from its own description, and what to do about it.

    The description names each backend before its features: "CUDA : ARCHS = 890 | ... | CPU : ...".
    """
    backends = re.findall(r"(\w+) : \w+ = ", info)
    names = {"MTL": "Metal"}
    build = " + ".join(names.get(name, name) for name in backends if name != "CPU") or "CPU"
    text = f"{build} build, {info}"
    if not has_nvidia_gpu or "CUDA" in backends:
        return text
    if nvcc:
        return f"{text}\n`python3 scripts/bootstrap.py` compiles it for the NVIDIA card."
    return (
        f"{text}\nFor the NVIDIA card, install the CUDA toolkit (nvcc) or set GATT_LLAMA_WHEEL, "
        "then run `python3 scripts/bootstrap.py`."
    )
