"""A cluster against one machine: `.venv/bin/python scripts/bench/cluster.py [--quick]`.

workers: accepted answers a second of the demo's recipe on two Ray nodes of one core each, against
the engine alone on two cores. All of it runs on this machine's two cores: Ray, the driver, and the
workers. Models are open before the time starts.
driver: results a second that one driver takes: it advances the dialogues and writes its log, while
two workers answer at once, without a model. Its processor time for each is what a larger machine
would be limited by.

Runs are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from synthesis import MODEL, N_CTX, Figure, Workload, make_workload, synthesize

from pipeline.cluster import nodes, session
from pipeline.cluster.worker import ModelSpec, Opened, Worker
from pipeline.files import JsonlLog
from pipeline.hub.convert import cached_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import EngineOptions, GenerationEngine, open_engine
from pipeline.recipe import Recipe
from pipeline.records import Answer, Completion, Message, Request, Task
from pipeline.system import core_count

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

NODES, MIN_RATIO = 2, 0.9
"""Nodes of one core each, and the bar of their rate against that of two cores."""
ECHO_SEQUENCES, ECHO_TURNS = 64, 20
TEXT = "The sea is salt because rivers carry minerals into it, and only water leaves it again. " * 3


class Size(NamedTuple):
    """How much is measured."""

    rounds: int
    dialogues: int
    results: int


class Echo(Worker):
    """A worker that answers at once."""

    async def open(self, number: int, spec: ModelSpec) -> Opened:
        """Load nothing."""
        return Opened(ECHO_SEQUENCES, "")

    async def complete(
        self, number: int, dialogue: int, request: Request, ended: int | None
    ) -> Completion:
        """Return a text of the usual length."""
        return Completion(TEXT, 60, 600, "stop")

    async def end(self, number: int, dialogue: int) -> None:
        """Do nothing."""


@contextmanager
def ray_nodes() -> Iterator[Cluster]:
    """Run `NODES` nodes of one core each, and a head without cores."""
    from ray.cluster_utils import Cluster

    with mock.patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0"}):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        try:
            for number in range(NODES):
                cluster.add_node(num_cpus=1, node_name=f"node-{number + 1}")
            yield cluster
        finally:
            cluster.shutdown()


def compare(cluster: Cluster, path: Path, size: Size) -> list[float]:
    """Return the cluster's rate relative to that of this machine, by round."""
    workload = make_workload(0.9, size.dialogues)
    options = EngineOptions(dialogues=size.dialogues, context=N_CTX)
    with ExitStack() as stack:
        alone = stack.enter_context(BatchEngine(path, size.dialogues, N_CTX))
        stack.enter_context(session.connect(cluster.address))
        spread = stack.enter_context(open_engine(path, options))
        for engine in (alone, spread):  # opens the model on the nodes
            _rate(engine, make_workload(0.9, NODES))
        ratios = []
        for number in range(size.rounds):
            order = [("alone", alone), ("cluster", spread)]
            rates = {n: _rate(e, workload) for n, e in (order if number % 2 else order[::-1])}
            ratios.append(rates["cluster"] / rates["alone"])
            print(
                f"accepted/s: alone {rates['alone']:.3f}, {NODES} nodes {rates['cluster']:.3f}, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    return ratios


def _rate(engine: GenerationEngine, workload: Workload) -> float:
    """Return the accepted answers a second."""
    return synthesize(engine.run, workload).accepted_per_second


def drive(cluster: Cluster, path: Path, results: int) -> tuple[float, float]:
    """Return results a second, and the driver's processor seconds for each."""
    numbers = count()

    def talk(log: JsonlLog) -> Task:
        messages: list[Message] = []
        for turn in range(ECHO_TURNS):
            messages.append({"role": "user", "content": TEXT})
            completion = yield Request(messages=tuple(messages), seed=next(numbers), max_tokens=96)
            messages.append({"role": "assistant", "content": completion.text})
            log.append(
                Answer(
                    dialogue=str(len(messages)),
                    turn=turn,
                    candidate=0,
                    raw=completion.text,
                    text=completion.text,
                    tokens=completion.tokens,
                    verdict="accepted",
                )
            )

    dialogues = results // ECHO_TURNS
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(nodes, "Worker", Echo),
        session.connect(cluster.address),
        JsonlLog(Path(folder) / "answers.jsonl") as log,
        open_engine(path, EngineOptions(dialogues=dialogues, context=N_CTX)) as engine,
    ):
        engine.run([talk(log) for _ in range(NODES * ECHO_SEQUENCES)])  # starts the workers
        start, used = time.perf_counter(), time.process_time()
        engine.run([talk(log) for _ in range(dialogues)])
        seconds, used = time.perf_counter() - start, time.process_time() - used
    count_ = dialogues * ECHO_TURNS
    print(f"driver: {count_ / seconds:.0f} results/s, {used / count_ * 1e6:.0f} us each")
    return count_ / seconds, used / count_


def measure(size: Size) -> dict[str, Figure]:
    """Return all figures."""
    path = cached_gguf(MODEL, Recipe().synthesize.format)
    print(f"{core_count()} cores; {path.stem}; {size.dialogues} dialogues", flush=True)
    with ray_nodes() as cluster:
        ratio = statistics.median(compare(cluster, path, size))
        rate, seconds = drive(cluster, path, size.results)
    return {
        "two_workers_against_two_cores": {
            "value": round(ratio, 3),
            "bar": MIN_RATIO,
            "holds": ratio >= MIN_RATIO,
        },
        "driver_results_per_second": {"value": round(rate, 1)},
        "driver_milliseconds_per_result": {"value": round(seconds * 1e3, 3)},
    }


def main() -> None:
    """Print each run, and the figures as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair of runs over 24 dialogues")
    quick = parser.parse_args().quick
    figures = measure(Size(1, 24, 4_000) if quick else Size(3, 40, 40_000))
    print(json.dumps({"bench": "cluster", "figures": figures}))


if __name__ == "__main__":
    main()
