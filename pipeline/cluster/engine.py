"""A model on all nodes of a cluster, with the interface of an engine on this machine.

The dialogues stay on the driver: what they record, resume and decide is where it is without a
cluster. A worker gets one request after another, and a dialogue stays with its worker for the sake
of the KV cache. Only where a worker is lost does another one answer the request that was open.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import __version__
from pipeline.cluster.nodes import Cluster, RemoteWorker
from pipeline.cluster.rates import Rates
from pipeline.cluster.shared_files import SharedFile, shared_file
from pipeline.cluster.worker import ModelSpec
from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_worker import advance
from pipeline.inference.generator import EngineOptions
from pipeline.inference.llama.model import LoadedModel
from pipeline.records import Completion, Request, Task

if TYPE_CHECKING:
    from ray import ObjectRef

_SECONDS_BETWEEN_LOOKS = 1.0
"""How often the driver looks for new nodes."""
_FIRST_NODES_SECONDS = 60.0
"""How long those that are there first may take to start before the others begin without them."""
_NO_NODE_SECONDS = 120.0
"""How long the driver waits for a node while there is none."""
_CLOSE_SECONDS = 60.0
_numbers = count()


class ClusterEngine:
    """The model in the file `gguf` on all nodes of `cluster`.

    Raises:
        GattError: not a GGUF, or a broken one.
    """

    def __init__(self, cluster: Cluster, gguf: Path, options: EngineOptions) -> None:
        self._info = open_gguf(gguf)
        adapter = options.adapter
        self.spec = ModelSpec(
            model=shared_file(self._info.path),
            adapter=shared_file(adapter.path) if adapter else None,
            adapter_scale=adapter.scale if adapter else 1.0,
            dialogues=options.dialogues,
            context=options.context,
            max_parallel=options.max_parallel,
        )
        self.cluster, self.number, self.dialogues = cluster, next(_numbers), count()
        self.name = self._info.path.name
        self.changes: dict[str, str] = {}
        self.sequences: dict[RemoteWorker, int] = {}
        """The dialogues in parallel of each worker that has opened the model."""
        self.refusals: dict[RemoteWorker, str] = {}
        self._vocabulary: LoadedModel | None = None
        self._sent: dict[str, list[ObjectRef[bytes]]] = {}
        self._sending = threading.Lock()

    def __enter__(self) -> ClusterEngine:
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory of all nodes."""
        import ray

        closing = [w.handle.close.remote(self.number) for w in self.sequences if not w.is_lost]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        self._sent.clear()
        if self._vocabulary:
            self._vocabulary.close()

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, by the model's vocabulary."""
        if self._vocabulary is None:
            self._vocabulary = LoadedModel(self._info, vocab_only=True)
        return self._vocabulary.tokenize(text)

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end; they are advanced in this thread, one at a time.

        Raises:
            GattError: no node can run the model.
        """
        asyncio.run(_Run(self, tasks).run())

    async def open_on(self, worker: RemoteWorker) -> None:
        """Open the model on a worker, and send it the files that its node lacks.

        Raises:
            GattError: the node cannot run it.
        """
        handle = worker.handle
        if worker.machine is None:
            worker.machine = await handle.describe.remote()
        if worker.machine.version != __version__:
            raise GattError(
                f"gatt {worker.machine.version} is installed there, {__version__} here. Install "
                "the same version."
            )
        for file in await handle.missing.remote(self.spec):
            log(f"cluster: sending {file.path.name} ({file.size / 1e9:.2f} GB) to {worker.name}")
            await handle.receive.remote(file, await asyncio.to_thread(self._send, file))
        opened = await handle.open.remote(self.number, self.spec)
        self.sequences[worker] = opened.sequences
        remarks = opened.remarks.removeprefix("llama.cpp: ") or f"{opened.sequences} sequences"
        log(f"cluster: {worker.name}: {remarks}")
        self._compare_processors()

    def _send(self, file: SharedFile) -> list[ObjectRef[bytes]]:
        """Put a file into the object store, once for all nodes."""
        import ray

        with self._sending:
            if file.sha256 not in self._sent:
                self._sent[file.sha256] = [ray.put(chunk) for chunk in file.chunks()]
            return self._sent[file.sha256]

    def _compare_processors(self) -> None:
        """Log once, and note, that results depend on which node an answer came from."""
        processors = {w.machine.processor for w in self.sequences if w.machine}
        if len(processors) > 1 and not self.changes:
            self.changes["processors"] = "; ".join(sorted(processors))
            log(
                "cluster: the nodes have different processors. Their answers to the same prompt "
                "can differ, so that another run may give other texts."
            )


@dataclass(slots=True)
class _Step:
    """A dialogue, and the request that it waits with; None before its first one."""

    task: Task
    request: Request | None = None


class _Run:
    """Drives some dialogues to their end: each sequence of each worker is a coroutine."""

    def __init__(self, engine: ClusterEngine, tasks: Iterable[Task]) -> None:
        self._engine, self._cluster = engine, engine.cluster
        self._waiting = deque(map(_Step, tasks))
        self._unfinished = len(self._waiting)
        self._more, self._rates = asyncio.Event(), Rates()
        self._work: set[asyncio.Task[None]] = set()
        self._opening = 0
        self._started = False

    async def run(self) -> None:
        """Return when all dialogues have ended.

        Raises:
            GattError: no node can run the model.
        """
        self._outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_if_finished()
        self._spawn(self._recruit())
        try:
            await self._outcome
        finally:
            work = list(self._work)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            self._rates.log_all()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and not self._outcome.done():
            self._outcome.set_exception(error)

    async def _recruit(self) -> None:
        """Start work on all nodes that are there, and then on each that joins."""
        await asyncio.to_thread(self._cluster.refresh)
        opening = [self._spawn(self._open(worker)) for worker in self._cluster.alive]
        if opening:  # together, so that each gets its share of the dialogues
            await asyncio.wait(opening, timeout=_FIRST_NODES_SECONDS)
        self._started = True
        self._start(list(self._engine.sequences))
        last_seen = time.monotonic()
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            for worker in await asyncio.to_thread(self._cluster.refresh):
                self._spawn(self._open(worker))
            self._rates.log_recent()
            if self._opening or any(not w.is_lost for w in self._engine.sequences):
                last_seen = time.monotonic()
            else:
                self._refuse_to_wait(time.monotonic() - last_seen)

    def _refuse_to_wait(self, seconds: float) -> None:
        """Check that the run can go on, where there has been no node for `seconds`.

        Raises:
            GattError: it cannot.
        """
        reasons = [reason for w, reason in self._engine.refusals.items() if not w.is_lost]
        if reasons:
            raise GattError(f"No node of the cluster can run {self._engine.name}: {reasons[0]}")
        if seconds > _NO_NODE_SECONDS:
            last = f" The last one was lost: {loss}." if (loss := self._cluster.last_loss) else ""
            raise GattError(
                f"The Ray cluster has had no node that works for {seconds:.0f} s.{last} Start nodes"
                " (`ray start --address=HOST:6379`), and run the same command again: what is done "
                "is not lost."
            )

    async def _open(self, worker: RemoteWorker) -> None:
        """Open the model on a worker, and let it work."""
        from ray.exceptions import RayError, RayTaskError

        if worker in self._engine.sequences or worker in self._engine.refusals:
            return
        self._opening += 1
        try:
            await self._engine.open_on(worker)
        except RayTaskError as error:  # of the node: a package that it lacks, too little memory
            is_own = isinstance(error.cause, GattError)
            self._refuse(worker, str(error.cause) if is_own else _reason(error))
        except RayError as error:
            self._cluster.lose(worker, _reason(error))
        except GattError as error:
            self._refuse(worker, str(error))
        else:
            if self._started:
                self._start([worker])
        finally:
            self._opening -= 1

    def _refuse(self, worker: RemoteWorker, reason: str) -> None:
        self._engine.refusals[worker] = reason
        log(f"cluster: {worker.name} is left out: {reason}")

    def _start(self, workers: Iterable[RemoteWorker]) -> None:
        """Start the sequences of workers, so that few dialogues are shared by their sizes."""
        sequences = self._engine.sequences
        slots = [
            ((number + 0.5) / sequences[worker], worker)
            for worker in workers
            if not worker.is_lost
            for number in range(sequences[worker])
        ]
        for _, worker in sorted(slots, key=lambda slot: slot[0]):
            self._spawn(self._drive(worker))

    async def _drive(self, worker: RemoteWorker) -> None:
        """Drive one dialogue after another in a sequence of a worker, until that is lost."""
        ended: int | None = None
        while not worker.is_lost:
            if not self._waiting:
                if ended is not None:
                    worker.handle.end.remote(self._engine.number, ended)
                    ended = None
                self._more.clear()
                await self._more.wait()
                continue
            step, number = self._waiting.popleft(), next(self._engine.dialogues)
            step.request = step.request or advance(step.task, None)
            is_new = True
            while step.request is not None:
                completion = await self._complete(worker, number, step.request, ended)
                if completion is None:
                    self._waiting.appendleft(step)
                    self._more.set()
                    return
                ended, is_new = None, False
                self._rates.count(worker.name)
                step.request = advance(step.task, completion)
            ended = ended if is_new else number
            self._unfinished -= 1
            self._end_if_finished()

    async def _complete(
        self, worker: RemoteWorker, number: int, request: Request, ended: int | None
    ) -> Completion | None:
        """Return a completion; None if the worker is lost."""
        from ray.exceptions import RayError, RayTaskError

        try:
            completion: Completion = await worker.handle.complete.remote(
                self._engine.number, number, request, ended
            )
        except RayTaskError as error:
            if isinstance(error.cause, GattError):
                raise error.cause from None
            raise
        except RayError as error:
            self._cluster.lose(worker, _reason(error))
            return None
        return completion

    def _end_if_finished(self) -> None:
        if not self._unfinished and not self._outcome.done():
            self._outcome.set_result(None)


def _reason(error: Exception) -> str:
    """Return what an error of Ray says in one line; it may have a whole traceback."""
    from ray.exceptions import RayTaskError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith("ModuleNotFoundError")]
    last = lines[-1:] if isinstance(error, RayTaskError) else lines[:1]
    return next(iter([*missing, *last]), type(error).__name__).rstrip(".")
