"""`gatt doctor`: what this machine is, which backends work (each is tried), and which base models fit."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

from pipeline.backends.hub import presets
from pipeline.backends.llama import system_info
from pipeline.backends.unsloth import try_four_bits
from pipeline.console import out
from pipeline.machine import GB, available_memory, training_memory


def run() -> None:
    """Print it."""
    import torch

    memory, device = available_memory(), "cpu"
    out(f"CPU        {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    out(f"memory     {memory / GB:.1f} GB available")
    out(f"disk       {shutil.disk_usage('.').free / GB:.1f} GB free here")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        out(f"GPU        {card.name}, {card.total_memory / GB:.1f} GB")
        memory, device = card.total_memory, "cuda"
    else:
        out("GPU        none that torch can use")
    installed = importlib.util.find_spec("unsloth") is not None
    out(f"Unsloth    {try_four_bits(device) if installed else 'missing: `python3 scripts/demo.py` installs it'}")
    out(f"llama.cpp  {system_info()}")
    out("\nbase model         parameters   training needs about   fits")
    for name, preset in presets().items():
        need = training_memory(preset["parameters"], device)
        out(f"{name:18} {preset['parameters'] / 1e9:8.2f} B {need / GB:18.1f} GB {'yes' if need < memory else 'no':>8}")
