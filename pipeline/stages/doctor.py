"""`gatt doctor`: this machine, the backends that work on it, and the base models it can train.

Each backend is tried, not only looked up.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil

from pipeline.console import print_result, print_table
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
    import torch

    gpu = on_gpu()
    gpu_text = "none that PyTorch can use"
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        gpu_text = f"{properties.name}, {properties.total_memory / GB:.1f} GB"
    unsloth = "not installed; `python3 scripts/demo.py` installs it"
    if importlib.util.find_spec("unsloth"):
        unsloth = check_nf4("cuda" if gpu else "cpu")
    print_result(f"CPU        {platform.processor() or platform.machine()}, {core_count()} cores")
    print_result(f"Memory     {available_memory() / GB:.1f} GB available")
    print_result(f"Disk       {shutil.disk_usage('.').free / GB:.1f} GB free in this folder")
    print_result(f"GPU        {gpu_text}")
    print_result(f"Unsloth    {unsloth}")
    print_result(f"llama.cpp  {system_info()}")
