"""llama.cpp's own converter, which benchmarks and slow tests compare with; pip downloads it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import platformdirs


def converter() -> Path:
    """Return the folder of llama.cpp in the source package of llama-cpp-python, downloaded once."""
    folder = Path(platformdirs.user_cache_dir("gatt")) / "llama_cpp_python-0.3.36"
    if not (folder / "vendor" / "llama.cpp" / "models" / "templates").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        package = ["llama-cpp-python==0.3.36", "--no-deps", "--no-binary", "llama-cpp-python"]
        command = [sys.executable, "-m", "pip", "download", *package, "--dest", str(folder.parent)]
        subprocess.run(command, check=True, capture_output=True)
        archive = folder.parent / f"{folder.name}.tar.gz"
        with tarfile.open(archive) as packed:
            parts = ("/conversion/", "/gguf-py/", "/convert_", "/models/templates/")
            packed.extractall(
                folder.parent,
                [m for m in packed.getmembers() if any(p in m.name for p in parts)],
                filter="data",
            )
        archive.unlink()
    return folder / "vendor" / "llama.cpp"
