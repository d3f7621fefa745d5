"""What this machine has: cores, memory, disk. Checked before work that needs them begins."""

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
    """Whether this process is the only one, or the first of those that `accelerate launch` has started: it writes, and speaks."""
    return os.environ.get("RANK", "0") == "0"


def available_memory() -> int:
    """Bytes that this process may still take: free memory, less where a cgroup or `ulimit -v` sets a limit."""
    import psutil

    limits = [psutil.virtual_memory().available]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        limits.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def trim_memory() -> None:
    """Return to the system what is not used any more: a trained model's gigabytes would stay with the process until it ends."""
    gc.collect()  # a trainer and its model know each other
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def require_memory(needed: float, purpose: str) -> None:
    """Stop before the machine does.

    Raises:
        GattError: `needed` bytes are more than there are.
    """
    there = available_memory()
    if needed > there:
        raise GattError(
            f"Too little memory to {purpose}: about {needed / GB:.1f} GB needed, {there / GB:.1f} GB available. "
            "Close other programs, or take a smaller model (`gatt doctor` lists what fits)."
        )


def require_disk(folder: Path, needed: float, purpose: str) -> None:
    """Stop before the disk is full.

    Raises:
        GattError: fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GattError(
            f"Too little disk space in {folder} to {purpose}: about {needed / GB:.2f} GB needed, {free / GB:.2f} GB free. "
            "Make room, or choose another folder with --run."
        )
