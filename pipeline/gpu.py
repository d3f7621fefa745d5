"""The NVIDIA cards of this machine as their driver lists them, and why PyTorch cannot use one.

Only the standard library is imported at the top: scripts/bootstrap.py reads this file before
anything is installed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_QUERY = ("name", "driver_version", "memory.total", "memory.free")
_NVIDIA_SMI_TIMEOUT_SECONDS = 60
_MIN_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver branch for each major version of CUDA (release notes of the CUDA toolkit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvidiaGpu:
    """A card; `total_bytes` and `free_bytes` are 0 where it shares the memory of the computer."""

    name: str
    driver: str
    total_bytes: int
    free_bytes: int


class NvidiaSmi(NamedTuple):
    """What `nvidia-smi` lists; `error` is its complaint when it cannot reach the driver."""

    gpus: list[NvidiaGpu]
    error: str


def query_nvidia_smi() -> NvidiaSmi:
    """Return the cards that `nvidia-smi` lists; none where it is not installed."""
    program = shutil.which("nvidia-smi")
    if not program:
        return NvidiaSmi([], "")
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_NVIDIA_SMI_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return NvidiaSmi([], str(error))
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        first = next(iter(lines or done.stderr.splitlines()), f"exit status {done.returncode}")
        return NvidiaSmi([], "" if "No devices were found" in first else first.strip())
    return NvidiaSmi([_parse_gpu(line) for line in lines if line.count(",") >= len(_QUERY) - 1], "")


def _parse_gpu(line: str) -> NvidiaGpu:
    name, driver, total, free = (part.strip() for part in line.rsplit(",", len(_QUERY) - 1))
    return NvidiaGpu(name=name, driver=driver, total_bytes=_mib(total), free_bytes=_mib(free))


def _mib(text: str) -> int:
    """Return MiB as bytes; cards that share the computer's memory say "[N/A]"."""
    return int(text) * 2**20 if text.isdigit() else 0


def find_nvcc() -> str:
    """Return the path of CUDA's compiler, or ""; its folder is often not on PATH."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders)) or ""


def allocator_settings() -> dict[str, str]:
    """Return the environment variable that keeps PyTorch from fragmenting the memory of a card.

    It is empty where the user has set one, and where expandable segments do not work: without an
    NVIDIA driver, on Windows and its Linux subsystem, and on Tegra boards.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any(name in os.environ for name in names) or not shutil.which("nvidia-smi"):
        return {}
    tegra = Path("/etc/nv_tegra_release").exists()
    if sys.platform != "linux" or "microsoft" in platform.release().lower() or tegra:
        return {}
    return {names[0]: "expandable_segments:True"}


def pytorch_problem() -> str:
    """Return why PyTorch cannot use the NVIDIA card, and what to do; "" if it can or none is there.

    A card that PyTorch lists and has no kernels for counts, too.
    """
    import torch

    if torch.cuda.is_available():
        if torch.version.hip:
            return ""
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
        return card_problem(torch.__version__, capability, architectures)
    gpus, error = query_nvidia_smi()
    if not gpus:
        return error and f"nvidia-smi reports: {error}"
    problem = build_problem(gpus[0], torch.__version__, torch.version.cuda)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not problem and hidden is not None:
        problem = f"CUDA_VISIBLE_DEVICES={hidden} hides it. Unset it to use the card."
    if not problem:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as reason:
            problem = f"PyTorch reports: {str(reason).splitlines()[0]}"
    return problem and f"{gpus[0].name}: {problem}"


def build_problem(gpu: NvidiaGpu, version: str, cuda: str | None) -> str:
    """Return why PyTorch `version`, built for `cuda`, does not run on the driver; "" if it does."""
    driver = int(text) if (text := gpu.driver.partition(".")[0]).isdigit() else sys.maxsize
    if not cuda:
        # === leaves out the CPU build, whose version differs only by "+cpu".
        install = f"`pip install torch==={version.partition('+')[0]}`"
        source = install if sys.platform == "linux" else "pytorch.org says how"
        newest = max(_MIN_DRIVER)
        note = f" CUDA {newest} needs driver {_MIN_DRIVER[newest]}; {gpu.driver} is installed."
        return f"PyTorch {version} is built without CUDA. Install the CUDA build: {source}." + (
            note if driver < _MIN_DRIVER[newest] else ""
        )
    minimum = _MIN_DRIVER.get(int(cuda.partition(".")[0]), 0)
    if driver >= minimum:
        return ""
    usable = max((m for m, oldest in _MIN_DRIVER.items() if driver >= oldest), default=0)
    other = f", or install a PyTorch build for CUDA {usable}" if usable else ""
    return (
        f"PyTorch {version} is built for CUDA {cuda}, which needs driver {minimum} or newer; "
        f"{gpu.driver} is installed. Update the driver{other}."
    )


def card_problem(version: str, capability: tuple[int, int], architectures: Sequence[str]) -> str:
    """Return that a card is older than all of PyTorch's `architectures` ("sm_75"); "" if not."""
    numbers = [text.partition("_")[2].rstrip("af") for text in architectures]
    oldest = min((int(number) for number in numbers if number.isdigit()), default=0)
    major, minor = capability
    if 10 * major + minor >= oldest:
        return ""
    return (
        f"the card has compute capability {major}.{minor}; PyTorch {version} is compiled for "
        f"{oldest // 10}.{oldest % 10} and newer. Install a PyTorch build for an older CUDA, or "
        "set CUDA_VISIBLE_DEVICES=-1 to train on the CPU."
    )


def compiler_problem() -> str:
    """Return why Triton cannot compile the C code of its launchers here, or ""; it is tried.

    Unsloth's kernels need it at run time: a C compiler and the headers of Python.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "no C compiler (gcc). Install one, for example Debian's build-essential."
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\n")
        flags = ["-shared", "-fPIC", f"-I{sysconfig.get_path('include')}"]
        command = [compiler, str(source), *flags, "-o", str(source.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C compiler cannot be run ({error}). Set CC to one that can."
    if not done.returncode:
        return ""
    if "Python.h" in done.stderr:
        return "Python.h is missing. Install the headers of Python, for example python3-dev."
    return f"{compiler} fails: {next(iter(done.stderr.splitlines()), 'without a message')}"
