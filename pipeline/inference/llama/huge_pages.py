"""Huge pages for weights and KV caches, on Linux.

A pass on a CPU reads all weights. In pages of 4 KiB much of its time goes into address translation,
above all on a virtual machine. Many systems give pages of 2 MiB only to memory for which a program
asks (`madvise`), which llama.cpp does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_PAGE, _HUGE_PAGE = 4 << 10, 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""From Linux's mman.h. Pages that are filled after the first are huge; the second, since Linux 6.1,
moves those that are filled already."""
_PRESENT = 63
"""The bit of an entry of `_PAGEMAP` that says whether the page is in memory."""


def request_huge_pages() -> None:
    """Ask for huge pages for the large allocations of this process that are not filled yet."""
    for start, end in _large_allocations():
        _advise(start, end, _MADV_HUGEPAGE)


def move_to_huge_pages() -> None:
    """Move the large allocations of this process to huge pages.

    What the kernel cannot move stays where it is.
    """
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
    if sys.platform != "linux" or not _lends_huge_pages():
        return
    for line in _MAPS.read_text().splitlines():
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
        return "[never]" not in _ENABLED.read_text()
    return False


def _filled(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the longest spans (start, end) of huge pages with anything in memory.

    A call that moves pages ends at one without.
    """
    entries = np.fromfile(
        _PAGEMAP, np.uint64, (last - first) // _PAGE, offset=first // _PAGE * np.uint64().nbytes
    )
    filled = (entries >> _PRESENT).reshape(-1, _HUGE_PAGE // _PAGE).any(axis=1)
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        yield first + start * _HUGE_PAGE, first + end * _HUGE_PAGE
