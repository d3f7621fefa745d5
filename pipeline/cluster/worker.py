"""The Ray actor on a node: the engines of the models that the driver has open.

It runs on all of a node's cores, or on one GPU, and is a single machine in all else.
"""

from __future__ import annotations

import asyncio
import io
import platform
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import __version__
from pipeline.cluster.calls import CallServer
from pipeline.cluster.shared_files import SharedFile
from pipeline.errors import GattError
from pipeline.inference.batch_engine import BatchEngine, instruction_sets
from pipeline.inference.llama.gpu import describe_gpus, gpu_devices
from pipeline.inference.llama.model import Adapter
from pipeline.records import Completion, Request
from pipeline.system import limit_cores

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model to open on every node; the other fields are as for `EngineOptions`."""

    model: SharedFile
    adapter: SharedFile | None
    adapter_scale: float
    dialogues: int
    context: int
    max_parallel: int

    @property
    def files(self) -> tuple[SharedFile, ...]:
        """Return the files that a node needs."""
        return (self.model, self.adapter) if self.adapter else (self.model,)


class Machine(NamedTuple):
    """What a node is: results are equal, bit for bit, on CPUs of one `processor`."""

    version: str
    processor: str


class Opened(NamedTuple):
    """A model on a node: the dialogues that it runs in parallel, and the remarks about it."""

    sequences: int
    remarks: str


class Worker:
    """The engines of one node, by the driver's numbers for them.

    The methods that take long run in a thread: the actor answers others in the meantime.
    """

    def __init__(self, cores: int) -> None:
        limit_cores(cores)
        self._cores = cores
        self._servers: dict[int, CallServer] = {}

    async def describe(self) -> Machine:
        """Return what this machine is."""
        return await asyncio.to_thread(_describe)

    async def missing(self, spec: ModelSpec) -> list[SharedFile]:
        """Return the files of a model that this machine lacks."""
        return await asyncio.to_thread(lambda: [f for f in spec.files if not f.locate()])

    async def receive(self, file: SharedFile, chunks: Sequence[ObjectRef[bytes]]) -> None:
        """Write a file that this machine lacks."""
        await asyncio.to_thread(file.receive, _contents(chunks))

    async def open(self, number: int, spec: ModelSpec) -> Opened:
        """Open a model.

        Raises:
            GattError: too little memory, or llama.cpp refuses the file.
        """
        remarks = io.StringIO()
        with redirect_stderr(remarks):
            engine = await asyncio.to_thread(_open, spec)
        self._servers[number] = CallServer(engine, self._cores)
        return Opened(self._servers[number].sequences, remarks.getvalue().strip())

    async def complete(
        self, number: int, dialogue: int, request: Request, ended: int | None
    ) -> Completion:
        """Answer a request of a dialogue; `ended` is the one whose sequence it takes."""
        return await asyncio.wrap_future(self._servers[number].submit(dialogue, request, ended))

    async def end(self, number: int, dialogue: int) -> None:
        """Free the sequence of a dialogue that has ended."""
        self._servers[number].end(dialogue)

    async def close(self, number: int) -> None:
        """Close a model."""
        if server := self._servers.pop(number, None):
            await asyncio.to_thread(server.close)


def _describe() -> Machine:
    devices = gpu_devices()
    where = describe_gpus(devices) if devices else platform.machine()
    return Machine(__version__, f"{where}, {instruction_sets()}")


def _contents(chunks: Sequence[ObjectRef[bytes]]) -> Iterator[bytes]:
    import ray

    for chunk in chunks:
        yield ray.get(chunk)


def _open(spec: ModelSpec) -> BatchEngine:
    adapter = Adapter(_path(spec.adapter), spec.adapter_scale) if spec.adapter else None
    return BatchEngine(
        _path(spec.model), spec.dialogues, spec.context, spec.max_parallel, adapter=adapter
    )


def _path(file: SharedFile) -> Path:
    path = file.locate()
    if path is None:
        raise GattError(f"{file.path.name} was removed from the node. Run the same command again.")
    return path
