"""Which library trains on this machine: Unsloth (CUDA, ROCm, XPU, CPU), or MLX on Apple silicon."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gpu import pytorch_problem
from pipeline.inference.logits import Logits
from pipeline.system import is_main_process
from pipeline.training import mlx, unsloth
from pipeline.training.job import TrainingJob, TrainingResult


class Backend(Protocol):
    """What a training library provides; the modules `unsloth` and `mlx` are the two backends."""

    def train(self, job: TrainingJob) -> TrainingResult:
        """Train an adapter on the base model, in `job.load_in_4bit`, and save it in PEFT's format.

        Training resumes from the last complete checkpoint.

        Raises:
            GattError: as `train_loop`, or a setting that this backend does not have.
        """

    def predict(
        self,
        model_dir: Path,
        adapter_dir: Path | None,
        sequences: Sequence[Sequence[int]],
        *,
        load_in_4bit: bool,
    ) -> Logits:
        """Return the logits of the base model with an adapter, on the first few sequences.

        `load_in_4bit` is the precision of training. Without it, and always with MLX, whose 4-bit
        format differs from NF4, the weights are in float32.
        """


def choose_backend() -> Backend:
    """Return the backend for this machine; say so when an NVIDIA card has to stay unused.

    Raises:
        GattError: PyTorch lists a card that it has no kernels for.
    """
    if mlx.available():
        return mlx
    report_unused_gpu()
    return unsloth


@cache
def report_unused_gpu() -> None:
    """Say in one line why the CPU trains although there is an NVIDIA card; once a process.

    Raises:
        GattError: PyTorch lists a card that it has no kernels for.
    """
    problem = pytorch_problem()
    if problem and unsloth.on_gpu():
        raise GattError(problem)
    if problem and is_main_process():
        log(f"train: the GPU is not used, the CPU trains. {problem}")
