"""`gatt doctor`: this machine, the backends that work on it, and the base models it can train.

Each backend is tried, not only looked up. With a model, training and generation are timed for a
moment.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.console import log, print_result, print_table
from pipeline.errors import GattError
from pipeline.gpu import (
    NvidiaGpu,
    compiler_problem,
    find_nvcc,
    pytorch_problem,
    query_nvidia_smi,
)
from pipeline.hub.models import find_model, shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.inference.batch_engine import BatchEngine, system_info
from pipeline.recipe import Train
from pipeline.records import Request, Task
from pipeline.system import GB, available_memory, core_count, cpu_name
from pipeline.training.cpu.precision import has_bfloat16
from pipeline.training.cpu.speed import (
    CPU_TOKENS_AT_A_TIME,
    TOKENS_PER_DIALOGUE,
    estimate_step,
)
from pipeline.training.memory import (
    GPU_SIZES_GB,
    TOKENS_PER_STEP,
    largest_preset,
    tokens_that_fit,
    training_memory,
    usable_bytes,
)
from pipeline.training.projections import linear_layers_of, own_projections
from pipeline.training.unsloth import check_nf4, free_memory, on_gpu

_STREAMS = 12
"""Dialogues at a time in the test of generation; an evaluation has as many or more."""
_COLUMNS = ("base model", "parameters", "GB on a CPU", "GB on a GPU", "GPU size", "tokens here")


def run(model: str = "") -> None:
    """Print the machine and every preset; with a `model`, only what training that one takes."""
    settings, gpu, free = Train(), on_gpu(), free_memory()
    if not model:
        _print_machine()
    print_result(
        f"\nMemory to train with rank {settings.rank}: with {TOKENS_PER_DIALOGUE} tokens at a time "
        f"(one dialogue) to {CPU_TOKENS_AT_A_TIME} on a CPU, {TOKENS_PER_STEP} (a step) on a GPU."
        "\nMeasured on a CPU, estimated for a GPU. With room to spare, a model in 4 bits takes "
        "more on a CPU, and trains faster. The last column is for the "
        f"{free / GB:.1f} GB that are free here.\n"
    )
    names = [model] if model else list(presets())
    print_table(
        _COLUMNS, [_row(name, shape_of(name), settings, free=free, gpu=gpu) for name in names]
    )
    if not model:
        largest = largest_preset(free, TOKENS_PER_DIALOGUE, settings, gpu=gpu) or "none"
        print_result(f"\nLargest model that this {'GPU' if gpu else 'CPU'} can train: {largest}")
        return
    if model not in presets():
        adapted = own_projections(settings.target_modules, linear_layers_of(model))
        print_result(f"\nAn adapter is trained on {', '.join(adapted)}.")
    if not gpu:
        print_result(f"\n{speed_text(model, settings)}")


def speed_text(model: str, settings: Train) -> str:
    """Return how fast this CPU trains a model and generates with it, from tests of a few seconds.

    Generation is timed where the model is a GGUF on this disk.
    """
    log("doctor: timing a few layers of the model's sizes in training")
    step = estimate_step(shape_of(model), settings)
    share = min(1.0, step.product_seconds / step.seconds)
    lines = [
        "Speed on this CPU, estimated from a test of a few seconds (steps of the 135M model took "
        "up to 11 % less than estimated, of a 0.5B model a quarter more). Other programs slow it "
        "down.",
        f"training    {step.seconds:.1f} s a step ({settings.batch_size} dialogues of "
        f"{TOKENS_PER_DIALOGUE} tokens), {step.learned_tokens / step.seconds:.0f} learned tokens/s."
        f" {share:.0%} are matrix products, the rest reads and writes what lies between them.",
    ]
    if Path(model).is_file() or (model in presets() and presets()[model].package):
        log("doctor: timing generation")
        lines.append(f"generation  {_generation_text(find_model(model).path)}")
    else:
        lines.append("generation  is timed for a GGUF file: gatt doctor --model FILE.gguf")
    return "\n".join(lines)


def _generation_text(file: Path) -> str:
    try:
        with BatchEngine(file, _STREAMS, 256, _STREAMS) as engine:
            _generate(engine, range(10, 10 + _STREAMS), 2)  # reads the file
            prompts, short = _generate(engine, range(30, 30 + _STREAMS), 1)
            tokens, seconds = _generate(engine, range(50, 50 + _STREAMS), 9)
    except GattError as error:  # without a chat template, for example
        return f"not timed: {error}"
    rate = (tokens - prompts) / max(1e-9, seconds - short)
    read = rate / _STREAMS * file.stat().st_size
    return (
        f"{rate:.0f} tokens/s, {_STREAMS} dialogues at a time with {file.name}, which is read at "
        f"{read / GB:.1f} GB/s."
    )


def _generate(engine: BatchEngine, numbers: Sequence[int], max_tokens: int) -> tuple[int, float]:
    """Return the tokens of an answer to each of a few prompts of equal length, and the seconds."""
    tokens = 0

    def ask(number: int) -> Task:
        nonlocal tokens
        text = f"Write a long story about the number {number}."
        completion = yield Request(
            messages=({"role": "user", "content": text},),
            seed=number,
            max_tokens=max_tokens,
            max_thought_tokens=0,
        )
        tokens += completion.tokens

    start = time.monotonic()
    engine.run(map(ask, numbers))
    return tokens, time.monotonic() - start


def _row(
    name: str, shape: ModelShape, settings: Train, *, free: float, gpu: bool
) -> tuple[object, ...]:
    """Return the cells of `_COLUMNS` for one model; `free` is in bytes."""
    tokens = tokens_that_fit(shape, settings, free, gpu=gpu)
    return (
        name,
        f"{shape.parameters / 1e9:.2f} B",
        _memory_range(shape, settings, gpu=False),
        _memory_range(shape, settings, gpu=True),
        _smallest_gpu(shape, settings),
        tokens if tokens >= TOKENS_PER_DIALOGUE else "-",
    )


def _memory_range(shape: ModelShape, settings: Train, *, gpu: bool) -> str:
    low, high = (
        training_memory(shape, settings, tokens, gpu=gpu) / GB
        for tokens in (TOKENS_PER_DIALOGUE, TOKENS_PER_STEP if gpu else CPU_TOKENS_AT_A_TIME)
    )
    return f"{low:.1f}–{high:.1f}"


def _smallest_gpu(shape: ModelShape, settings: Train) -> str:
    """Return the smallest of the common GPU sizes that trains a whole step at a time, or "-"."""
    needed = training_memory(shape, settings, TOKENS_PER_STEP, gpu=True)
    return next((f"{size} GB" for size in GPU_SIZES_GB if needed <= usable_bytes(size)), "-")


def _print_machine() -> None:
    gpu, cards = on_gpu(), query_nvidia_smi().gpus
    unsloth = "not installed; `python3 scripts/demo.py` installs it"
    if importlib.util.find_spec("unsloth"):
        unsloth = check_nf4("cuda" if gpu else "cpu")
    rows = [
        ("CPU", _cpu_text()),
        ("Memory", f"{available_memory() / GB:.1f} GB available"),
        ("Disk", f"{shutil.disk_usage('.').free / GB:.1f} GB free in this folder"),
        ("GPU", _gpu_text(_usable_gpus() if gpu else _listed_gpus(cards))),
        ("Unsloth", unsloth),
    ]
    if gpu or cards:
        rows.append(("Triton", _triton_text()))
    llama = llama_text(system_info(), has_nvidia_gpu=bool(cards), nvcc=find_nvcc())
    rows.append(("llama.cpp", llama))
    for name, text in rows:
        print_result(f"{name:<11}" + text.replace("\n", "\n" + " " * 11))


def _cpu_text() -> str:
    """Return what the CPU is, and what PyTorch trains in on it; MLX does not depend on that."""
    trains = "bfloat16" if has_bfloat16() else "float32: it has no instructions for bfloat16"
    name = cpu_name() or platform.machine()
    return f"{name}, {core_count()} cores, PyTorch trains in {trains}"


def _usable_gpus() -> list[str]:
    """Return a line for each device that PyTorch can use."""
    import torch

    lines = []
    for device in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        lines.append(f"{name}, {total / GB:.1f} GB, {free / GB:.1f} GB free")
    return lines


def _listed_gpus(cards: list[NvidiaGpu]) -> list[str]:
    """Return a line for each card that only the driver lists."""
    return [
        f"{card.name}, {card.total_bytes / GB:.1f} GB, {card.free_bytes / GB:.1f} GB free, "
        f"driver {card.driver}; PyTorch cannot use it"
        for card in cards
    ]


def _gpu_text(lines: list[str]) -> str:
    """Return a line for each card, and why PyTorch cannot use one that is there."""
    problem = pytorch_problem()
    return "\n".join([*(lines or ["none that PyTorch can use"]), *([problem] if problem else [])])


def _triton_text() -> str:
    """Return whether Triton is there and can compile; Unsloth's kernels are written in it."""
    if not importlib.util.find_spec("triton"):
        return "not installed. It comes with the CUDA build of PyTorch."
    problem = compiler_problem()
    return f"cannot compile: {problem}" if problem else "can compile (C compiler and Python.h)"


def llama_text(info: str, *, has_nvidia_gpu: bool, nvcc: str) -> str:
    """Return for what llama.cpp was built, from its own description, and what to do about it.

    The description names each backend before its features: "CUDA : ARCHS = 890 | ... | CPU : ...".
    """
    backends = re.findall(r"(\w+) : \w+ = ", info)
    names = {"MTL": "Metal"}
    build = " + ".join(names.get(name, name) for name in backends if name != "CPU") or "CPU"
    text = f"{build} build, {info}"
    if not has_nvidia_gpu or "CUDA" in backends:
        return text
    if nvcc:
        return f"{text}\n`python3 scripts/bootstrap.py` compiles it for the NVIDIA card."
    return (
        f"{text}\nFor the NVIDIA card, install the CUDA toolkit (nvcc) or set GATT_LLAMA_WHEEL, "
        "then run `python3 scripts/bootstrap.py`."
    )
