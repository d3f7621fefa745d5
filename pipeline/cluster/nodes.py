"""A worker on each node of a Ray cluster.

Actors, not Ray Data: a dialogue is not a row. Its next request depends on the last answer, whose KV
cache is on one node, and the answer belongs in the driver's log at once.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.worker import Machine, Worker
from pipeline.console import log

_MAX_LOSSES = 3
"""Workers of a node that may die before the node is left out."""
_MAX_CALLS = 1 << 14
"""Calls that a worker answers at the same time: one for each sequence, and some more."""
_ID_LENGTH = 6


@dataclass(slots=True, eq=False, kw_only=True)
class RemoteWorker:
    """A worker, seen from the driver: on all `cores` of the node, or on one GPU and its share.

    `machine` is known once it has answered; `is_lost` after its process or node has ended.
    """

    name: str
    node_id: str
    cores: int
    gpus: int
    handle: Any
    machine: Machine | None = None
    is_lost: bool = False


@dataclass(slots=True)
class Cluster:
    """The workers so far, how often one of each node has died, and the reason of the last time.

    `storage` is where training keeps its checkpoints; "" is the folder of the run.
    """

    workers: list[RemoteWorker] = field(default_factory=list)
    losses: Counter[str] = field(default_factory=Counter)
    last_loss: str = ""
    storage: str = ""

    @property
    def alive(self) -> list[RemoteWorker]:
        """Return the workers that have not been lost."""
        return [worker for worker in self.workers if not worker.is_lost]

    def refresh(self) -> list[RemoteWorker]:
        """Start workers on the nodes that have none, and return these."""
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        names = Counter(_name(node) for node in nodes)
        staffed = {worker.node_id for worker in self.alive}
        started: list[RemoteWorker] = []
        for node in nodes:
            node_id = node["NodeID"]
            if node_id in staffed or self.losses[node_id] >= _MAX_LOSSES:
                continue
            is_unique = names[_name(node)] == 1
            name = _name(node) + ("" if is_unique else f"/{node_id[:_ID_LENGTH]}")
            started += _start_workers(name, node_id, node["Resources"])
        self.workers += started
        return started

    def lose(self, worker: RemoteWorker, reason: str) -> None:
        """Take a worker that no longer answers out, and log it."""
        import ray

        if worker.is_lost:
            return
        worker.is_lost = True
        self.losses[worker.node_id] += 1
        self.last_loss = f"{worker.name}, {reason}"
        log(f"cluster: {worker.name} is lost ({reason}). What it was doing is done elsewhere.")
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(worker.handle)

    def release(self) -> None:
        """End all workers, so that others can use their cores; the next run starts new ones."""
        import ray

        for worker in self.alive:
            worker.is_lost = True
            ray.kill(worker.handle)

    def describe(self) -> str:
        """Return how large it is: "a Ray cluster of 2 nodes with 16 cores"."""
        nodes = {worker.node_id for worker in self.alive}
        cores, gpus = (sum(w.cores for w in self.alive), sum(w.gpus for w in self.alive))
        cards = f" and {gpus} GPUs" if gpus else ""
        return f"a Ray cluster of {len(nodes)} nodes with {cores} cores{cards}"


def _name(node: dict[str, Any]) -> str:
    """Return the name that `ray start --node-name` gave, or the host's; by default it is an IP."""
    name = str(node.get("NodeName") or "")
    address = str(node["NodeManagerAddress"])
    return name if name not in ("", address) else f"{node['NodeManagerHostname']} ({address})"


def _start_workers(name: str, node_id: str, resources: dict[str, float]) -> list[RemoteWorker]:
    """Start a worker on each GPU of a node, or one on its cores; none where it has neither."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if not cores:
        return []
    count = max(1, min(gpus, cores))
    started = []
    for number in range(count):
        share = len(range(number, cores, count))
        handle = (
            ray.remote(Worker)
            .options(
                num_cpus=share,
                num_gpus=int(gpus > 0),
                max_concurrency=_MAX_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(share)
        )
        started.append(
            RemoteWorker(
                name=f"{name} GPU {number}" if gpus > 1 else name,
                node_id=node_id,
                cores=share,
                gpus=int(gpus > 0),
                handle=handle,
            )
        )
    return started
