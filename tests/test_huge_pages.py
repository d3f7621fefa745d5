"""Huge pages for what llama.cpp reads in each pass, where the kernel lends them."""

from __future__ import annotations

import mmap
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from pipeline import system
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama import model as llama_model
from pipeline.inference.llama.model import LoadedModel
from pipeline.system import move_to_huge_pages, request_huge_pages

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not system._lends_huge_pages(), reason="no huge pages here"
)
MIB = 1 << 20


def _huge_bytes(address: int | None = None) -> int:
    """Return the bytes in huge pages in the range of memory at `address`, or else in all."""
    count, inside = 0, address is None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first and address is not None:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            count += int(rest.split()[0]) * 1024
    return count


def _allocate(size: int) -> tuple[mmap.mmap, np.ndarray]:
    """Return memory in small pages, with an array over it; nothing is filled yet."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, np.uint8)


def _huge_span(array: np.ndarray) -> tuple[int, int]:
    """Return the first and the last boundary of huge pages in an array's memory."""
    start, end, page = array.ctypes.data, array.ctypes.data + array.nbytes, system._HUGE_PAGE
    return -(-start // page) * page, end // page * page


def test_filled_memory_is_moved_and_what_is_between_stays_empty() -> None:
    _, array = _allocate(32 * MIB)
    array[: 8 * MIB], array[-8 * MIB :] = 7, 9
    middle = array.ctypes.data + 16 * MIB
    assert _huge_bytes(middle) == 0

    move_to_huge_pages()

    # The ends of the range need not be the ends of huge pages.
    assert _huge_bytes(middle) >= 12 * MIB
    assert len(list(system._filled(*_huge_span(array)))) == 2
    assert (array[: 8 * MIB] == 7).all() and (array[-8 * MIB :] == 9).all()
    assert not array[8 * MIB : -8 * MIB].any()


def test_memory_that_is_filled_after_the_request_has_huge_pages() -> None:
    _, array = _allocate(16 * MIB)
    request_huge_pages()
    assert _huge_bytes(array.ctypes.data + 8 * MIB) == 0
    array[:] = 7
    assert _huge_bytes(array.ctypes.data + 8 * MIB) >= 12 * MIB


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_nothing_changes_where_the_kernel_lends_none(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = tmp_path / "enabled"
    if setting:
        enabled.write_text(setting)
    monkeypatch.setattr(system, "_HUGE_PAGES", enabled)
    _, array = _allocate(16 * MIB)
    request_huge_pages()
    array[:] = 7
    move_to_huge_pages()
    assert _huge_bytes(array.ctypes.data + 8 * MIB) == 0


def test_a_hidden_page_map_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_PAGE_MAP", tmp_path / "none")
    _, array = _allocate(16 * MIB)
    array[:] = 7
    move_to_huge_pages()
    assert _huge_bytes(array.ctypes.data + 8 * MIB) == 0


def test_a_file_that_would_fill_the_memory_stays_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    file = cached_gguf(find_model("smollm2-135m"), "Q8_0")
    info = open_gguf(file)

    def mapped_while_loaded() -> int:
        model = LoadedModel(info, gpu_layers=0)
        count = Path("/proc/self/maps").read_text().count(str(file))
        model.close()
        return count

    by_the_reader = Path("/proc/self/maps").read_text().count(str(file))
    assert mapped_while_loaded() == by_the_reader
    monkeypatch.setattr(llama_model, "available_memory", lambda: file.stat().st_size)
    assert mapped_while_loaded() > by_the_reader


def test_weights_and_kv_cache_of_an_engine_are_in_huge_pages() -> None:
    """In a process of its own: another one may free huge pages meanwhile."""
    model = cached_gguf(find_model("smollm2-135m"), "Q8_0")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        huge_bytes = process.submit(_huge_bytes_of_engine, model).result()
    cache = 2 * 2048 * 30 * 2 * 192 * 2  # sequences, cells, layers, K and V, width, F16
    assert huge_bytes >= 0.9 * (model.stat().st_size + cache)


def _huge_bytes_of_engine(model: Path) -> int:
    before = _huge_bytes()
    with BatchEngine(model, 2, 2048):
        return _huge_bytes() - before
