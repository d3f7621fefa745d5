"""The machine's memory, disk and cache folder, checked before they are needed; its processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import platformdirs

from pipeline.console import log
from pipeline.errors import GattError

GB = 1e9
_CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_MAP, _PAGE_MAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE, _HUGE_PAGE = 4 << 10, 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""From Linux's mman.h. Pages that are filled after the first are huge; the second, since Linux 6.1,
moves those that are filled already."""
_ENTRY, _PRESENT = 8, 0x80
"""Bytes of an entry of `_PAGE_MAP`."""


def is_main_process() -> bool:
    """Return whether this process has rank 0, which alone writes files and logs.

    `accelerate launch` starts several processes; without it, every process has rank 0.
    """
    return os.environ.get("RANK", "0") == "0"


def cpu_name() -> str:
    """Return the name of the CPU, or "" where the system does not say it."""
    with contextlib.suppress(OSError):
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                return value.strip()
    return platform.processor()


_core_limit = sys.maxsize


def limit_cores(count: int) -> None:
    """Let this process use at most `count` cores from now on: its share of a machine."""
    global _core_limit
    _core_limit = count


def core_count() -> int:
    """Return how many processor cores this process may use.

    This is less than the machine has under `taskset`, in a Slurm job or in a container: threads
    beyond it would only wait for each other.
    """
    cores = min(_core_limit, os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = min(_core_limit, len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def available_memory() -> int:
    """Return how many bytes this process may still allocate.

    This is the free memory, or less under the limit of a cgroup v2 or of `ulimit -v`. Cached files
    count as free: the kernel drops them when memory is needed.
    """
    import psutil

    limits = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        maximum = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        limits.append(maximum - used + _cached_bytes((_CGROUP / "memory.stat").read_text()))
    if sys.platform != "win32":
        import resource

        soft_limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft_limit != resource.RLIM_INFINITY:
            limits.append(soft_limit - psutil.Process().memory_info().vms)
    return max(0, min(limits))


def _cached_bytes(memory_stat: str) -> int:
    """Return the bytes of cached files, which a cgroup's `memory.current` contains."""
    rows = (line.split() for line in memory_stat.splitlines())
    return sum(int(size) for name, size in rows if name in ("active_file", "inactive_file"))


def trim_memory() -> None:
    """Return freed memory to the operating system, and that of a GPU to its driver.

    Otherwise the gigabytes of a trained model would stay with the process until it ends; llama.cpp
    would find no room on the GPU.
    """
    gc.collect()  # a trainer and its model refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return freed pages of the heap to the operating system, on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def request_huge_pages() -> None:
    """Ask for huge pages for the large allocations of this process that are not filled yet.

    Many systems give pages of 2 MiB only to memory for which a program asks. In pages of 4 KiB
    much of the time in which weights are read goes into address translation, above all on a virtual
    machine. Elsewhere than on Linux nothing happens.
    """
    for start, end in _large_allocations():
        _advise(start, end, _MADV_HUGEPAGE)


def move_to_huge_pages() -> None:
    """Move the large allocations of this process to huge pages.

    What the kernel cannot move stays where it is.
    """
    with contextlib.suppress(OSError):  # a container may hide `_PAGE_MAP`
        for first, last in _large_allocations():
            if _advise(first, last, _MADV_HUGEPAGE):
                for start, end in _filled(first, last):
                    _advise(start, end, _MADV_COLLAPSE)


def _advise(start: int, end: int, advice: int) -> bool:
    address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
    return bool(ctypes.CDLL(None).madvise(address, length, advice) == 0)


def _large_allocations() -> Iterator[tuple[int, int]]:
    """Yield the span of huge pages (start, end) in each range of memory that no file backs.

    There are none where the kernel lends no huge pages.
    """
    if sys.platform != "linux" or mmap.PAGESIZE != _PAGE or not _lends_huge_pages():
        return
    for line in _MEMORY_MAP.read_text().splitlines():
        span, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        start, end = (int(address, 16) for address in span.split("-"))
        first, last = -(-start // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
        if first < last:
            yield first, last


def _lends_huge_pages() -> bool:
    """Return whether the kernel gives huge pages to a program that asks for them."""
    with contextlib.suppress(OSError):
        return "[never]" not in _HUGE_PAGES.read_text()
    return False


def _filled(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the longest spans (start, end) of huge pages with anything in memory.

    A call that moves pages ends at one without.
    """
    with _PAGE_MAP.open("rb") as file:
        file.seek(first // _PAGE * _ENTRY)
        entries = file.read((last - first) // _PAGE * _ENTRY)
    size, start = _HUGE_PAGE // _PAGE * _ENTRY, first
    for page in range(first, last, _HUGE_PAGE):
        offset = (page - first) // _PAGE * _ENTRY
        # The highest bit of an entry, in its last byte, says whether the page is in memory.
        if max(entries[offset + _ENTRY - 1 : offset + size : _ENTRY]) < _PRESENT:
            if start < page:
                yield start, page
            start = page + _HUGE_PAGE
    if start < last:
        yield start, last


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
            f"{free / GB:.2f} GB free. Make room, or choose a folder on another disk: --run for a "
            "run, XDG_CACHE_HOME for the cache."
        )


def cache_path(name: str) -> Path:
    """Return the path of `name` in the user's cache folder.

    Where that cannot be written and does not have it, it is in the temporary folder: a container
    may run without a home folder of its own.

    Raises:
        GattError: the temporary folder cannot be used either.
    """
    folder = Path(platformdirs.user_cache_dir("gatt"))
    path = folder / name
    usable = is_writable(folder) or os.path.exists(path)
    return path if usable else _fallback_cache(folder) / name


def use_writable_cache() -> None:
    """Let the Hub's libraries download to `cache_path` if the home folder cannot be written.

    It has to run before they are imported.
    """
    hub_cache = Path(os.path.expanduser("~"), ".cache", "huggingface")
    chosen = any(map(os.environ.get, ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")))
    if not (chosen or os.path.exists(hub_cache) or is_writable(hub_cache.parent)):
        os.environ["HF_HOME"] = str(cache_path("huggingface"))


@cache
def is_writable(folder: Path) -> bool:
    """Return whether files can be written in `folder`, which is created; tried once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@cache
def _fallback_cache(folder: Path) -> Path:
    """Create the temporary folder that replaces `folder`; nobody else can write there."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    try:
        fallback = Path(tempfile.gettempdir()) / f"gatt-cache-{user}"
        fallback.mkdir(mode=0o700, exist_ok=True)
        owner = fallback.lstat().st_uid if user != "" else user
        if owner != user or fallback.is_symlink() or not is_writable(fallback):
            raise PermissionError(f"{fallback} belongs to somebody else")
    except OSError as error:
        raise GattError(
            f"The cache folder {folder} cannot be written, nor one in the temporary folder "
            f"({error}). Set XDG_CACHE_HOME to a folder that can."
        ) from error
    log(
        f"The cache folder {folder} cannot be written; converted models go to {fallback}. Set "
        "XDG_CACHE_HOME to keep them elsewhere."
    )
    return fallback
