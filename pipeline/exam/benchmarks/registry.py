"""The benchmarks by the names that `gatt exam --benchmark` takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import GattError, did_you_mean
from pipeline.exam.benchmarks import (
    mt_eval,
    multi_if,
    persona_drift,
    real_guardrails,
    sequor,
    struct_flow,
    sysbench,
)
from pipeline.exam.benchmarks.base import Benchmark, BenchmarkTask, Reader, require_checks
from pipeline.files import sha256

BENCHMARKS: dict[str, Reader] = {
    "mt-eval": mt_eval.read,
    "multi-if": multi_if.read,
    "persona-drift": persona_drift.read,
    "real-guardrails": real_guardrails.read,
    "sequor": sequor.read,
    "struct-flow": struct_flow.read,
    "sysbench": sysbench.read,
}


def read_benchmark(name: str, path: Path | None) -> Benchmark:
    """Read a benchmark from the user's file or folder, and try its checks.

    Raises:
        GattError: no such benchmark or file, another form, or a check that cannot be made.
    """
    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise GattError(f"No benchmark {name!r}. {hint} Expected one of {', '.join(BENCHMARKS)}.")
    if path is None:
        raise GattError(
            f"--benchmark {name} needs its data, which gatt does not contain: --benchmark-file "
            "PATH (pipeline/exam/benchmarks/README.md says which file)."
        )
    if not path.exists():
        raise GattError(f"No file or folder at {path}. Expected the data of {name}.")
    tasks = _with_unique_ids(BENCHMARKS[name](path))
    if not tasks:
        raise GattError(f"{path} has no dialogues. Expected the data of {name}.")
    benchmark = Benchmark(name, sha256(path), tuple(tasks))
    require_checks(benchmark)
    return benchmark


def _with_unique_ids(tasks: Sequence[BenchmarkTask]) -> list[BenchmarkTask]:
    """Return the tasks, with a number after an id that an earlier one has: it is a reply's key."""
    counts: Counter[str] = Counter()
    unique = []
    for task in tasks:
        counts[task.id] += 1
        if counts[task.id] > 1:
            dialogue = replace(task.assigned.dialogue, id=f"{task.id} ({counts[task.id]})")
            task = replace(task, assigned=replace(task.assigned, dialogue=dialogue))
        unique.append(task)
    return unique
