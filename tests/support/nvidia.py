"""An executable `nvidia-smi` that prints what the driver of a card would."""

from __future__ import annotations

import os
from pathlib import Path

RTX_3060 = "NVIDIA GeForce RTX 3060, 550.54.14, 12288, 11900"


def write_nvidia_smi(folder: Path, output: str = RTX_3060, status: int = 0) -> str:
    """Write it into `folder` and return a PATH on which it stands first."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    program.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])
