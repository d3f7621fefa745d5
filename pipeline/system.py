"""The machine's memory and disk, checked before work that needs them, and its processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import sys
from pathlib import Path

from pipeline.errors import GattError

GB = 1e9


def is_main_process() -> bool:
    """Return whether this process has rank 0, which alone writes files and logs.

    `accelerate launch` starts several processes; without it, every process has rank 0.
    """
    return os.environ.get("RANK", "0") == "0"


def core_count() -> int:
    """Return how many processor cores this process may use.

    This is less than the machine has under `taskset`, in a Slurm job or in a container: threads
    beyond it would only wait for each other.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def available_memory() -> int:
    """Return how many bytes this process may still allocate.

    This is the free memory, or less under the limit of a cgroup v2 or of `ulimit -v`.
    """
    import psutil

    limits = [psutil.virtual_memory().available]
    cgroup = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        maximum = int((cgroup / "memory.max").read_text())
        limits.append(maximum - int((cgroup / "memory.current").read_text()))
    if sys.platform != "win32":
        import resource

        soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft_limit != resource.RLIM_INFINITY:
            limits.append(soft_limit - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def trim_memory() -> None:
    """Return freed memory to the operating system.

    Otherwise the gigabytes of a trained model would stay with the process until it ends.
    """
    gc.collect()  # a trainer and its model refer to each other
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_memory(needed: float, purpose: str) -> None:
    """Check that `needed` bytes of memory are available before they are allocated.

    Raises:
        GattError: fewer are.
    """
    available = available_memory()
    if needed > available:
        raise GattError(
            f"Too little memory to {purpose}: about {needed / GB:.1f} GB needed, "
            f"{available / GB:.1f} GB available. Close other programs, or take a smaller model "
            "(`gatt doctor` lists what fits)."
        )


def require_disk(folder: Path, needed: float, purpose: str) -> None:
    """Check that `needed` bytes are free on the disk of `folder`.

    Raises:
        GattError: fewer are.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GattError(
            f"Too little disk space in {folder} to {purpose}: about {needed / GB:.2f} GB needed, "
            f"{free / GB:.2f} GB free. Make room, or choose another folder with --run."
        )
