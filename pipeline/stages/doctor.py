"""`gatt doctor`: what this machine is, which backends work (each is tried), and which base models can be trained."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

from pipeline.console import out
from pipeline.hub.models import presets, shape_of
from pipeline.hub.shape import Shape
from pipeline.inference.batch_engine import system_info
from pipeline.recipe import Train
from pipeline.system import GB, available_memory
from pipeline.training.memory import (
    CARDS,
    DIALOGUE,
    STEP,
    largest_preset,
    room,
    tokens_that_fit,
    training_memory,
)
from pipeline.training.unsloth import free_memory, on_gpu, try_four_bits


def run(model: str = "") -> None:
    """Print it; with a `model`, what it takes to train that one."""
    shapes = {model: shape_of(model)} if model else {name: shape_of(name) for name in presets()}
    gpu, memory = on_gpu(), free_memory()
    if not model:
        _machine()
    here = "GPU" if gpu else "CPU"
    settings = Train()
    out(
        f"\nTo train with rank {settings.rank}, {DIALOGUE} to {STEP} tokens at a time (one dialogue, a whole step): measured on a "
        f"CPU, estimated\nfor a GPU. Here {memory / GB:.1f} GB are free.\n\n"
        "base model         parameters           on a CPU           on a GPU   card   tokens that fit here"
    )
    for name, shape in shapes.items():
        fit = tokens_that_fit(shape, settings, memory, gpu)
        card = next(
            (
                f"{size} GB"
                for size in CARDS
                if training_memory(shape, settings, STEP, True) <= room(size)
            ),
            "-",
        )
        out(
            f"{name[-18:]:18} {shape.parameters / 1e9:8.2f} B {_range(shape, False):>18} {_range(shape, True):>18} {card:>6} "
            f"{fit if fit >= DIALOGUE else 'none':>10}"
        )
    if not model:
        out(
            f"\nThe largest that can be trained on this {here}: {largest_preset(memory, gpu, DIALOGUE, settings) or 'none'}."
        )


def _range(shape: Shape, gpu: bool) -> str:
    low, high = (training_memory(shape, Train(), tokens, gpu) / GB for tokens in (DIALOGUE, STEP))
    return f"{low:.1f} to {high:.1f} GB"


def _machine() -> None:
    import torch

    out(f"CPU        {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    out(f"memory     {available_memory() / GB:.1f} GB available")
    out(f"disk       {shutil.disk_usage('.').free / GB:.1f} GB free here")
    if on_gpu():
        card = torch.cuda.get_device_properties(0)
        out(f"GPU        {card.name}, {card.total_memory / GB:.1f} GB")
    else:
        out("GPU        none that torch can use")
    installed = importlib.util.find_spec("unsloth") is not None
    device = "cuda" if on_gpu() else "cpu"
    out(
        f"Unsloth    {try_four_bits(device) if installed else 'missing: `python3 scripts/demo.py` installs it'}"
    )
    out(f"llama.cpp  {system_info()}")
