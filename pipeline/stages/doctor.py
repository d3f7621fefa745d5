"""`gatt doctor`: what this machine is, which backends work (each is tried), and which base models can be trained."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

from pipeline.console import print_result
from pipeline.hub.models import presets, shape_of
from pipeline.hub.shape import ModelShape
from pipeline.inference.batch_engine import system_info
from pipeline.recipe import Train
from pipeline.system import GB, available_memory
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


def run(model: str = "") -> None:
    """Print it; with a `model`, what it takes to train that one."""
    shapes = {model: shape_of(model)} if model else {name: shape_of(name) for name in presets()}
    gpu, memory = on_gpu(), free_memory()
    if not model:
        _machine()
    here = "GPU" if gpu else "CPU"
    settings = Train()
    print_result(
        f"\nTo train with rank {settings.rank}, {TOKENS_PER_DIALOGUE} to {TOKENS_PER_STEP} tokens at a time (one dialogue, a whole step): measured on a "
        f"CPU, estimated\nfor a GPU. Here {memory / GB:.1f} GB are free.\n\n"
        "base model         parameters           on a CPU           on a GPU   card   tokens that fit here"
    )
    for name, shape in shapes.items():
        fit = tokens_that_fit(shape, settings, memory, gpu)
        card = next(
            (
                f"{size} GB"
                for size in GPU_SIZES_GB
                if training_memory(shape, settings, TOKENS_PER_STEP, True) <= usable_bytes(size)
            ),
            "-",
        )
        print_result(
            f"{name[-18:]:18} {shape.parameters / 1e9:8.2f} B {_range(shape, False):>18} {_range(shape, True):>18} {card:>6} "
            f"{fit if fit >= TOKENS_PER_DIALOGUE else 'none':>10}"
        )
    if not model:
        print_result(
            f"\nThe largest that can be trained on this {here}: {largest_preset(memory, TOKENS_PER_DIALOGUE, settings, gpu=gpu) or 'none'}."
        )


def _range(shape: ModelShape, gpu: bool) -> str:
    low, high = (
        training_memory(shape, Train(), tokens, gpu) / GB
        for tokens in (TOKENS_PER_DIALOGUE, TOKENS_PER_STEP)
    )
    return f"{low:.1f} to {high:.1f} GB"


def _machine() -> None:
    import torch

    print_result(f"CPU        {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print_result(f"memory     {available_memory() / GB:.1f} GB available")
    print_result(f"disk       {shutil.disk_usage('.').free / GB:.1f} GB free here")
    if on_gpu():
        card = torch.cuda.get_device_properties(0)
        print_result(f"GPU        {card.name}, {card.total_memory / GB:.1f} GB")
    else:
        print_result("GPU        none that torch can use")
    installed = importlib.util.find_spec("unsloth") is not None
    device = "cuda" if on_gpu() else "cpu"
    print_result(
        f"Unsloth    {check_nf4(device) if installed else 'missing: `python3 scripts/demo.py` installs it'}"
    )
    print_result(f"llama.cpp  {system_info()}")
