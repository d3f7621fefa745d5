"""What training computes in on a CPU: bfloat16 if it has instructions for it, else float32.

PyTorch emulates products in bfloat16 where they are missing: 8 to 100 times as slow as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""What `torch.cpu.get_capabilities` calls them: two of x86-64, one of Arm."""


@cache
def has_bfloat16() -> bool:
    """Return whether this CPU multiplies matrices in bfloat16 itself.

    An older PyTorch cannot say: False, as most CPUs do not.
    """
    import torch

    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in _INSTRUCTIONS)


def cpu_dtype() -> torch.dtype:
    """Return the format of weights and activations."""
    import torch

    return torch.bfloat16 if has_bfloat16() else torch.float32
