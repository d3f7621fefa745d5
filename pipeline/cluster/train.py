"""Training in several processes of a Ray cluster, by Ray Train: one for each GPU, or each node.

A process trains in a folder of its own, as a single machine would. After each checkpoint the first
one's `train/` folder goes to storage that all machines see, and from there to all processes of a
later attempt, however many these are.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.cluster.session import current_cluster
from pipeline.cluster.storage import unusable
from pipeline.console import log
from pipeline.errors import GattError
from pipeline.system import is_main_process
from pipeline.training.job import PROCESS_TIMEOUT, last_checkpoint

if TYPE_CHECKING:
    from ray.train import Result, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    from pipeline.cluster.storage import Storage

OUTPUT = "train"
"""The folder, in that of a run, which training writes."""
_SECONDS_BETWEEN_LOOKS = 0.5
_REMARK_OF_RAY = "Reporting training result"


class Work(Protocol):
    """What a process does: train in `folder / OUTPUT`, from the last checkpoint there.

    `on_checkpoint` has to be called in all processes after each checkpoint, with its step. The
    class or function is imported on each node, so the same version has to be installed there.
    """

    def __call__(self, folder: Path, on_checkpoint: Callable[[int], None]) -> None: ...


def train_on_ray(
    work: Work, files: Mapping[str, bytes], out: Path, *, storage: Storage, batch: int
) -> None:
    """Run `work` on the connected cluster, and copy the first process's output to `out / OUTPUT`.

    Every process begins with `files`, by their path in its folder. Training goes on from the last
    checkpoint in `storage`; it does so, too, after a process has died, with the nodes that are
    left. As many processes are used as share `batch` dialogues evenly.

    Raises:
        GattError: what `work` raises, or the storage cannot be used.
    """
    import ray
    from ray.train import TrainingFailedError
    from ray.util.queue import Queue

    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # it would print each line twice
    if cluster := current_cluster():
        cluster.release()  # the cores are needed now
    lines = Queue(actor_options={"num_cpus": 0})
    config = {"work": work, "files": ray.put(dict(files)), "lines": lines}
    step = -1
    while True:
        try:
            result = _fit(_trainer(config, storage, _scaling(batch)), lines)
        except TrainingFailedError as error:
            _raise_own(error)
            reached = _last_step(storage)
            if reached <= step:  # the second failure in the same place
                raise
            step = reached
            log(f"train: a process has died ({_reason(error)}); going on after step {step}")
        except ray.exceptions.RayError as error:
            raise GattError(
                f"Training could not start on the Ray cluster ({_reason(error)}). Install the same "
                "version of gatt, with the extras train and cluster, on every node."
            ) from error
        else:
            break
    if not (result.checkpoint and (result.metrics or {}).get("is_finished")):
        raise GattError(
            f"Training was stopped after step {_last_step(storage)}. The same command "
            "resumes from there."
        )
    result.checkpoint.to_directory(str(out / OUTPUT))


def _fit(trainer: TorchTrainer, lines: Queue) -> Result:
    """Run the trainer, and log what its processes say.

    It runs in a thread of its own, because on the main thread Ray would take over Ctrl-C.
    """
    from ray.util.queue import Empty

    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        is_done = outcome.done()
        try:
            log(lines.get(timeout=_SECONDS_BETWEEN_LOOKS))
        except Empty:
            if is_done:
                return outcome.result()


def _trainer(config: dict[str, Any], storage: Storage, scaling: ScalingConfig) -> TorchTrainer:
    from ray.train import CheckpointConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    try:
        return TorchTrainer(
            _run,
            train_loop_config=config,
            torch_config=TorchConfig(timeout_s=int(PROCESS_TIMEOUT.total_seconds())),
            scaling_config=scaling,
            run_config=RunConfig(
                name=storage.name,
                storage_path=storage.folder,
                storage_filesystem=storage.filesystem,
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
    except OSError as error:
        raise unusable(storage, error) from error


def _scaling(batch: int) -> ScalingConfig:
    """Return how many processes there are, and what each gets: a GPU, or else a node's cores."""
    import ray
    from ray.train import ScalingConfig

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu_nodes = [node for node in nodes if node.get("GPU")]
    unit = "GPU" if gpu_nodes else "node"
    available = int(sum(node["GPU"] for node in gpu_nodes))
    if not gpu_nodes:
        nodes = sorted((n for n in nodes if n.get("CPU")), key=lambda n: n["CPU"], reverse=True)
        available = len(nodes)
    if not available:
        raise GattError("No node of the Ray cluster has a core to train with. Add one.")
    workers = processes_for(batch, available)
    log(
        f"train: {workers} of {available} {unit}{'s' * (available > 1)}"
        + (f", because they share train.batch_size = {batch}" if workers < available else "")
    )
    if gpu_nodes:
        cores = max(1, int(min(node.get("CPU", 1) / node["GPU"] for node in gpu_nodes)))
        return ScalingConfig(
            num_workers=workers, use_gpu=True, resources_per_worker={"CPU": cores, "GPU": 1}
        )
    return ScalingConfig(
        num_workers=workers,
        resources_per_worker={"CPU": nodes[workers - 1]["CPU"]},
        placement_strategy="STRICT_SPREAD",
    )


def processes_for(batch: int, available: int) -> int:
    """Return the largest number of processes, at most `available`, that share a batch evenly."""
    return max(n for n in range(1, available + 1) if batch % n == 0)


class _Lines(io.TextIOBase):
    """Sends each line that is written to the driver, with the name of this node."""

    def __init__(self, lines: Queue, node: str) -> None:
        self._lines, self._node, self._text = lines, node, ""

    def write(self, text: str) -> int:
        """Send the lines that are complete."""
        *complete, self._text = (self._text + text).split("\n")
        for line in complete:
            if line.startswith(_REMARK_OF_RAY):
                continue
            self._lines.put(f"{self._node}: {line}")
        return len(text)


def _run(config: dict[str, Any]) -> None:
    """Train in one of the processes."""
    import ray
    import ray.train
    import torch

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else transformers sees one process only
    node = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    with (
        tempfile.TemporaryDirectory(prefix="gatt-train-") as name,
        redirect_stderr(_Lines(config["lines"], node)),
    ):
        folder = Path(name)
        for path, content in ray.get(config["files"]).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        if checkpoint := ray.train.get_checkpoint():
            shutil.rmtree(folder / OUTPUT, ignore_errors=True)
            checkpoint.to_directory(str(folder / OUTPUT))
        try:
            config["work"](folder, partial(_report, folder, is_finished=False))
        except GattError as error:
            raise GattError(f"{node}: {error}") from error
        _report(folder, last_checkpoint(folder / OUTPUT / "checkpoints"), is_finished=True)


def _report(folder: Path, step: int, *, is_finished: bool) -> None:
    """Upload what the first process has written so far; all processes wait for it."""
    import ray.train

    metrics = {"step": step, "is_finished": is_finished}
    if not is_main_process():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="gatt-upload-") as name:
        draft = Path(name) / OUTPUT
        shutil.copytree(folder / OUTPUT, draft, copy_function=os.link, ignore=_older_than(step))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(draft))


def _older_than(step: int) -> Callable[[str, list[str]], set[str]]:
    """Return a filter for `copytree` that leaves out all checkpoints but that of `step`."""
    return lambda _, names: {
        name for name in names if name.startswith("checkpoint-") and name != f"checkpoint-{step}"
    }


def _last_step(storage: Storage) -> int:
    """Return the step of the last checkpoint in storage; 0 if there is none."""
    from ray.train import Result

    try:
        result = Result.from_path(storage.path, storage.filesystem)
    except RuntimeError:  # there is nothing yet
        return 0
    return int((result.metrics or {}).get("step", 0))


def _failures(error: BaseException) -> list[BaseException]:
    """Return what the processes raised, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    return [getattr(failure, "_base_exc", failure) for failure in failures.values()]


def _raise_own(error: BaseException) -> None:
    for failure in _failures(error):
        if isinstance(failure, GattError):
            raise failure from None


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    first = _failures(error)[0]
    return f"{type(first).__name__}: {str(first).strip().partition(chr(10))[0]}"
