"""`gatt doctor`: what this machine is, which backends work, and which base models fit."""

from __future__ import annotations

import importlib.util
import os
import platform

from pipeline.backends.hub import presets
from pipeline.backends.llama import system_info
from pipeline.console import out
from pipeline.machine import GB, available_memory

# Bytes for each parameter: 4-bit weights, their dequantised working copies, adapter and activations. An estimate.
_TRAIN = 2.0


def run() -> None:
    """Print it."""
    import torch

    memory = available_memory()
    out(f"CPU        {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    out(f"memory     {memory / GB:.1f} GB available")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        out(f"GPU        {card.name}, {card.total_memory / GB:.1f} GB")
        memory = card.total_memory
    else:
        out("GPU        none that torch can use; Unsloth trains on its CPU backend")
    out(f"Unsloth    {'installed' if importlib.util.find_spec('unsloth') else 'missing: run scripts/demo.py once'}")
    out(f"llama.cpp  {system_info()}")
    out("\nbase model         parameters   training (estimate)   fits")
    for name, preset in presets().items():
        need = preset["parameters"] * _TRAIN
        out(f"{name:18} {preset['parameters'] / 1e9:8.2f} B {need / GB:15.1f} GB {'yes' if need < memory else 'no':>10}")
