"""Threads that call llama.cpp, and what stays of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from support.cores import pretend_cores

from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.records import Request, Task


@pytest.mark.parametrize("cores", [1, 2])
def test_the_callers_of_llama_cpp_end_with_the_last_context(
    base: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """OpenMP's teams of callers that live on would slow down PyTorch in the same process."""
    pretend_cores(monkeypatch, cores)
    request = Request(
        messages=({"role": "user", "content": "Why?"},), seed=1, max_tokens=2, temperature=0.0
    )

    def ask(engine: BatchEngine) -> None:
        def task() -> Task:
            yield request

        engine.run([task()])

    def callers() -> int:
        return sum(thread.name.startswith("gatt decode") for thread in threading.enumerate())

    with BatchEngine(base, 1, 256) as first:
        ask(first)
        with BatchEngine(base, 1, 256) as second:
            ask(second)
        assert callers() == 1
        ask(first)
    assert callers() == 0


def _answers_around_a_product_in_bfloat16(model: Path) -> list[str]:
    """Return the answers before and after PyTorch has used the main thread's AMX tiles."""
    import torch

    request = Request(messages=({"role": "user", "content": "Why?"},), seed=1, max_tokens=4)
    matrix = torch.ones(256, 256, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_cores(monkeypatch, 1)
        with BatchEngine(model, 1, 256) as engine:
            before = engine.complete(request)
            matrix.mm(matrix)
            return [before.text, engine.complete(request).text]


def test_pytorch_in_the_same_thread_changes_no_answer(base: Path) -> None:
    """With AMX in llama.cpp's build, a pass in a thread of PyTorch's ends the process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        before, after = process.submit(_answers_around_a_product_in_bfloat16, base).result()
    assert before == after


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of the process in /proc")
def test_loading_a_model_leaves_no_thread_behind(base: Path) -> None:
    """Where llama.cpp reorders weights (AMX), a team of OpenMP loads the model."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def load() -> int:
        before, deadline = threads(), time.monotonic() + 5
        model = LoadedModel(open_gguf(base), gpu_layers=0)
        while threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)  # they are ending
        model.close()
        return threads() - before

    with ThreadPoolExecutor(1) as caller:  # one that has no team yet
        assert caller.submit(load).result() <= 0
