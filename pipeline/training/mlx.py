"""QLoRA and LoRA through Unsloth's MLX backend, for Apple silicon: a `Backend`.

Data, order, loss and files are those of `trainer`. The base model is in MLX's own 4 bits (groups of
64 with an offset), not in NF4. Run so far on MLX's CPU build for Linux, never on Apple hardware.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.inference.logits import Logits
from pipeline.recipe import Train
from pipeline.training import unsloth
from pipeline.training.examples import TrainingExample
from pipeline.training.job import (
    GracefulStop,
    Step,
    TokenCounts,
    TrainingJob,
    TrainingResult,
    checkpoint_step,
    interrupted_error,
    last_checkpoint,
    length_grouped_batches,
    mark_complete,
    micro_batches,
    nonfinite_loss_error,
    remove_incomplete_checkpoints,
)
from pipeline.training.mlx_model import linear_layers, load_adapter, load_base, save_adapter
from pipeline.training.projections import own_projections

if TYPE_CHECKING:
    import mlx.nn
    import mlx.optimizers

_MAX_CHECKPOINTS = 2
_MAX_GRADIENT_NORM = 1.0


def available() -> bool:
    """Return whether Unsloth computes with MLX on this machine."""
    is_apple_silicon = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    return is_apple_silicon and all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm"))


def train(job: TrainingJob) -> TrainingResult:
    """Train an adapter on the base model and save it; see `Backend.train`."""
    settings = job.settings.model_copy(update={"learning_rate": job.learning_rate})
    if settings.dora or settings.report_to or settings.optimizer != "adamw":
        raise GattError(
            "MLX has no train.dora, no train.report_to and no 8-bit train.optimizer. Leave them "
            "out, or uninstall mlx to train on the CPU."
        )
    import mlx.core as mx

    mx.random.seed(job.seed)
    max_length = unsloth.sequence_length(job, minimum=0)
    base = load_base(job.model_dir, max_length, load_in_4bit=job.load_in_4bit)
    targets = own_projections(settings.target_modules, linear_layers(base))
    model = unsloth.load_unsloth().get_peft_model(
        base,
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        random_state=job.seed,
        use_rslora=settings.rslora,
    )
    if settings.init_adapter:
        load_adapter(model, Path(settings.init_adapter).expanduser())
    losses = train_loop(model, replace(job, settings=settings))
    save_adapter(model, job.adapter_dir, settings)
    return TrainingResult(losses, _compute_logits(model, [e.input_ids for e in job.examples]))


def predict(
    model_dir: Path,
    adapter_dir: Path | None,
    sequences: Sequence[Sequence[int]],
    *,
    load_in_4bit: bool,
) -> Logits:
    """Return the logits of the base model with an adapter, always in float32."""
    del load_in_4bit  # MLX's 4-bit format is not that of the exported files
    return unsloth.predict(model_dir, adapter_dir, sequences, load_in_4bit=False)


def train_loop(model: mlx.nn.Module, job: TrainingJob) -> list[float]:
    """Train the adapter of `model` in one process, and return the loss of every step.

    Raises:
        GattError: the loss is not finite, or the user stopped it.
    """
    import mlx.core as mx
    import mlx.optimizers

    settings = job.settings
    optimizer = mlx.optimizers.AdamW(0.0, weight_decay=settings.weight_decay, bias_correction=True)
    remove_incomplete_checkpoints(job.checkpoint_dir)
    first = last_checkpoint(job.checkpoint_dir)
    losses: list[float] = []
    if first:
        losses = _resume(model, optimizer, job.checkpoint_dir / f"checkpoint-{first}")
    examples, size = length_grouped_batches(job), settings.batch_size
    tokens, seconds = TokenCounts(), 0.0
    model.train()
    with GracefulStop() as stop:
        for number in range(first + 1, settings.max_steps + 1):
            start = time.monotonic()
            mx.random.seed(job.seed + number)  # for dropout: a resumed run draws the same numbers
            optimizer.learning_rate = learning_rate(settings, number - 1)
            batches = micro_batches(
                examples[(number - 1) * size : number * size], settings.max_tokens_per_micro_batch
            )
            losses.append(_training_step(model, optimizer, batches, settings))
            tokens, seconds = tokens.plus(batches), seconds + time.monotonic() - start
            if not math.isfinite(losses[-1]):
                raise nonfinite_loss_error(number, losses[-1], job.checkpoint_dir)
            job.on_step(
                Step(
                    number=number,
                    loss=losses[-1],
                    learning_rate=learning_rate(settings, number - 1),
                    tokens=tokens,
                    seconds=seconds,
                    peak_memory_bytes=mx.get_peak_memory(),
                )
            )
            is_last = number == settings.max_steps
            if stop.requested or is_last or number % settings.save_steps == 0:
                checkpoint = job.checkpoint_dir / f"checkpoint-{number}"
                _save_checkpoint(model, optimizer, losses, checkpoint, settings)
                if not stop.requested and job.should_stop(number, checkpoint):
                    break
            if stop.requested and not is_last:
                raise interrupted_error(number)
    return losses


def learning_rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step (from 0), as the schedules of transformers have it."""
    warmup_steps = max(1, int(settings.max_steps * settings.warmup_ratio))
    if step < warmup_steps:
        return settings.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, settings.max_steps - warmup_steps)
    decay = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "constant_with_warmup": 1.0,
    }
    return settings.learning_rate * decay[settings.lr_scheduler_type]


def _training_step(
    model: mlx.nn.Module,
    optimizer: mlx.optimizers.Optimizer,
    batches: Sequence[Sequence[TrainingExample]],
    settings: Train,
) -> float:
    """Update the adapter with the gradients of all micro-batches, and return the step's loss."""
    import mlx.core as mx
    import mlx.nn
    import mlx.optimizers
    import mlx.utils

    from pipeline.training import mlx_loss

    total_weight = sum(sum(e.weights) for batch in batches for e in batch)
    loss_and_gradients = mlx.nn.value_and_grad(model, mlx_loss.gatt_loss)
    total, gradients = mx.array(0.0), None
    for examples in batches:
        batch = mlx_loss.collate(examples)
        teacher = mlx_loss.teacher_logits(model, batch)
        loss, increments = loss_and_gradients(model, batch, teacher, settings, total_weight)
        total += loss
        gradients = (
            increments if gradients is None else mlx.utils.tree_map(mx.add, gradients, increments)
        )
        mx.eval(total, gradients)  # computes now: MLX is lazy, and would hold every micro-batch
    clipped, _ = mlx.optimizers.clip_grad_norm(gradients, _MAX_GRADIENT_NORM)
    optimizer.update(model, clipped)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return float(total)


def _compute_logits(model: mlx.nn.Module, sequences: Sequence[Sequence[int]]) -> Logits:
    """Return the logits of what follows each token of the first tokens of `sequences`."""
    import mlx.core as mx
    import numpy as np

    model.eval()
    prefixes = unsloth.first_tokens(sequences)
    rows = [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in prefixes]
    return Logits(prefixes, np.concatenate(rows))


def _save_checkpoint(
    model: mlx.nn.Module,
    optimizer: mlx.optimizers.Optimizer,
    losses: list[float],
    checkpoint: Path,
    settings: Train,
) -> None:
    """Write a checkpoint, and delete all but the last few."""
    import mlx.core as mx
    import mlx.utils

    save_adapter(model, checkpoint, settings)
    state = dict(mlx.utils.tree_flatten(optimizer.state))
    mx.save_safetensors(str(checkpoint / "optimizer.safetensors"), state)
    write_json(checkpoint / "losses.json", losses)
    mark_complete(checkpoint)
    checkpoints = sorted(checkpoint.parent.glob("checkpoint-*"), key=checkpoint_step)
    for outdated in checkpoints[:-_MAX_CHECKPOINTS]:
        shutil.rmtree(outdated)


def _resume(
    model: mlx.nn.Module, optimizer: mlx.optimizers.Optimizer, checkpoint: Path
) -> list[float]:
    """Load a checkpoint, and return the losses up to it."""
    import mlx.core as mx
    import mlx.utils

    load_adapter(model, checkpoint)
    state = mx.load(str(checkpoint / "optimizer.safetensors"))
    optimizer.state = mlx.utils.tree_unflatten(list(state.items()))
    return list(json.loads((checkpoint / "losses.json").read_text()))
