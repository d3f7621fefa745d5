"""llama.cpp's own converter, which benchmarks and slow tests compare with: fetched with pip, never part of the project."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs


def converter() -> Path:
    """llama.cpp's Python code as the source package of llama-cpp-python has it: downloaded once, read only."""
    folder = Path(platformdirs.user_cache_dir("gatt")) / "llama_cpp_python-0.3.36"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        wanted = [
            "llama-cpp-python==0.3.36",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
            "--dest",
            str(folder.parent),
        ]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *wanted], check=True, capture_output=True
        )
        archive = folder.parent / f"{folder.name}.tar.gz"
        with tarfile.open(archive) as packed:
            parts = ("/conversion/", "/gguf-py/", "/convert_")
            packed.extractall(
                folder.parent,
                [m for m in packed.getmembers() if any(p in m.name for p in parts)],
                filter="data",
            )
        archive.unlink()
    return folder / "vendor" / "llama.cpp"
