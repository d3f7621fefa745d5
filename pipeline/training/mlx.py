"""4-bit QLoRA through Unsloth's MLX backend, for Apple's processors: data, order, loss and files are those of `trainer`.

The base is rounded to MLX's own 4 bits (in groups of 64, with an offset), not to NF4. It was run on MLX's build for Linux on a CPU
only, never on Apple's hardware.
"""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.loss import collate
from pipeline.training.trainer import (
    GracefulStop,
    Step,
    TokenCounts,
    adapter_weights,
    interrupted_error,
    last_checkpoint,
    length_grouped_batches,
    mark_complete,
    micro_batches,
    nonfinite_loss_error,
)

_KEPT = 2
"""Checkpoints."""


def available() -> bool:
    """Whether Unsloth computes with MLX on this machine."""
    apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
    return apple and all(importlib.util.find_spec(name) for name in ("mlx", "mlx_lm"))


def train(
    loader: Any,
    folder: Path,
    examples: Sequence[TrainingExample],
    settings: Train,
    seed: int,
    checkpoints: Path,
    adapter: Path,
    on_step: Callable[[Step], None],
    enough: Callable[[int, Path], bool],
) -> tuple[list[float], Any]:
    """As `unsloth.train`, with Unsloth's `loader`; returns the loss of every step, and the network.

    Raises:
        GattError: as `trainer.loop`, or a setting that is not for MLX.
    """
    import mlx.core as mx

    if settings.dora or settings.report_to:
        raise GattError(
            "MLX has no train.dora and no train.report_to. Leave them out, or uninstall mlx to train on the CPU."
        )
    mx.random.seed(seed)
    network = load(loader, folder, settings.max_length)
    network = loader.get_peft_model(
        network,
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        random_state=seed,
        use_rslora=settings.rslora,
    )
    if settings.init_adapter:
        _load_adapter(network, Path(settings.init_adapter).expanduser())
    losses = train_loop(network, examples, settings, seed, checkpoints, on_step, enough)
    _save_adapter(network, adapter, settings)
    return losses, network


def load(loader: Any, folder: Path, length: int) -> Any:
    """The base in 4 bits.

    transformers 5 writes a rotary embedding's settings under a name of their own; MLX, which has older names for them, would take
    its defaults instead, and say nothing.
    """
    config = json.loads((folder / "config.json").read_text())
    rotary = config.get("rope_parameters") or {}
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            (Path(scratch) / file.name).symlink_to(file.resolve())
        if "rope_theta" in rotary:
            scaling = rotary if rotary.get("rope_type", "default") != "default" else None
            (Path(scratch) / "config.json").unlink()
            write_json(
                Path(scratch) / "config.json",
                config | {"rope_theta": rotary["rope_theta"], "rope_scaling": scaling},
            )
        network, _ = loader.from_pretrained(
            scratch, max_seq_length=length, load_in_4bit=True, local_files_only=True
        )
    return network


def train_loop(
    network: Any,
    examples: Sequence[TrainingExample],
    settings: Train,
    seed: int,
    checkpoints: Path,
    on_step: Callable[[Step], None],
    enough: Callable[[int, Path], bool] = lambda step, folder: False,
) -> list[float]:
    """As `trainer.loop`, in one process."""
    import mlx.core as mx
    import mlx.optimizers

    optimizer = mlx.optimizers.AdamW(0.0, weight_decay=settings.weight_decay, bias_correction=True)
    done = last_checkpoint(checkpoints)
    losses = _resume(network, optimizer, checkpoints / f"checkpoint-{done}") if done else []
    rows = [asdict(example) for example in length_grouped_batches(examples, settings, seed)]
    counted, seconds = TokenCounts(), 0.0
    network.train()
    with GracefulStop() as stop:
        for number in range(done + 1, settings.max_steps + 1):
            start = time.monotonic()
            mx.random.seed(seed + number)  # of the dropout: a run that goes on draws the same
            split = micro_batches(
                rows[(number - 1) * settings.batch_size : number * settings.batch_size],
                settings.max_tokens_per_micro_batch,
            )
            optimizer.learning_rate = rate(settings, number - 1)
            losses.append(_step(network, optimizer, split, settings))
            counted, seconds = counted.plus(split), seconds + time.monotonic() - start
            if not math.isfinite(losses[-1]):
                raise nonfinite_loss_error(number, losses[-1], checkpoints)
            on_step(
                Step(
                    number,
                    losses[-1],
                    rate(settings, number - 1),
                    *counted,
                    seconds,
                    mx.get_peak_memory(),
                )
            )
            saved = checkpoints / f"checkpoint-{number}"
            if stop.asked or number % settings.save_steps == 0 or number == settings.max_steps:
                _save(network, optimizer, losses, saved, settings)
                if not stop.asked and enough(number, saved):
                    break
            if stop.asked and number < settings.max_steps:
                raise interrupted_error(number)
    return losses


def rate(settings: Train, step: int) -> float:
    """The learning rate of a step (from 0), as transformers' schedules have it."""
    rising = max(1, int(settings.max_steps * settings.warmup_ratio))
    if step < rising:
        return settings.learning_rate * step / rising
    gone = (step - rising) / max(1, settings.max_steps - rising)
    falls = {
        "cosine": (1 + math.cos(math.pi * gone)) / 2,
        "linear": 1 - gone,
        "constant_with_warmup": 1.0,
    }
    return settings.learning_rate * falls[settings.lr_scheduler_type]


def _step(
    network: Any, optimizer: Any, split: Sequence[Sequence[dict[str, Any]]], settings: Train
) -> float:
    """One step of the optimizer over its parts; the loss."""
    import mlx.core as mx
    import mlx.nn
    import mlx.optimizers
    import mlx.utils

    weight = sum(sum(row["weights"]) for part in split for row in part)
    differentiate = mlx.nn.value_and_grad(network, gatt_loss)
    total, gradients = mx.array(0.0), None
    for part in split:
        batch = {name: mx.array(tensor.numpy()) for name, tensor in collate(part, 0).items()}
        loss, found = differentiate(network, batch, _teacher(network, batch), settings, weight)
        total += loss
        gradients = found if gradients is None else mlx.utils.tree_map(mx.add, gradients, found)
        mx.eval(total, gradients)
    clipped, _ = mlx.optimizers.clip_grad_norm(gradients, 1.0)
    optimizer.update(network, clipped)
    mx.eval(network.trainable_parameters(), optimizer.state)
    return float(total)


def gatt_loss(
    network: Any, batch: dict[str, Any], teacher: Any, settings: Train, weight: float
) -> Any:
    """As `objective.learned_loss`; `teacher` has the logits of the twins, or is None."""
    import mlx.core as mx
    import mlx.nn
    import numpy as np

    labels, weights = batch["labels"], np.array(batch["weights"])
    rows, places = np.nonzero(np.array(labels)[:, 1:] != IGNORE_INDEX)
    order = {
        (row, place + 1): n
        for n, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True))
    }
    logits = network(batch["input_ids"])[mx.array(rows), mx.array(places)].astype(mx.float32)
    losses = mlx.nn.losses.cross_entropy(logits, labels[mx.array(rows), mx.array(places + 1)])
    share = weights[rows, places + 1]
    if teacher is None:
        return (losses * mx.array(share)).sum() / weight
    alignment = np.array(
        [order.get((row, here), -1) for row, here, _ in np.array(batch["twins"]).T.tolist()]
    )
    own = alignment[alignment >= 0]
    apart = _divergence(
        teacher[mx.array(np.nonzero(alignment >= 0)[0])], logits[mx.array(own)], settings
    )
    apart_share = share[own] * (1 - settings.cross_entropy)
    share[own] *= settings.cross_entropy
    return ((losses * mx.array(share)).sum() + (apart * mx.array(apart_share)).sum()) / weight


def _teacher(network: Any, batch: dict[str, Any]) -> Any:
    """What the base, the adapter switched off, predicts of the twins in the chat as the teacher had it: logits in float32."""
    import mlx.core as mx

    if "twins" not in batch:
        return None
    row, _, there = batch["twins"]
    adapted = [module for _, module in network.named_modules() if "lora_a" in module]
    scales = [module.scale for module in adapted]
    network.eval()
    try:
        for module in adapted:
            module.scale = 0.0
        logits = network(batch["asked_ids"])[row, there - 1].astype(mx.float32)
        mx.eval(logits)
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale
        network.train()
    return logits


def _divergence(target: Any, logits: Any, settings: Train) -> Any:
    """As `objective.divergence`."""
    import mlx.core as mx

    wanted, found = (its / settings.temperature for its in (target, logits))
    wanted, found = (its - mx.logsumexp(its, axis=-1, keepdims=True) for its in (wanted, found))
    if settings.top_k and settings.top_k < wanted.shape[-1]:
        likeliest = mx.argpartition(-wanted, settings.top_k - 1, axis=-1)[:, : settings.top_k]
        wanted, found = (
            _with_rest(mx.take_along_axis(its, likeliest, axis=-1)) for its in (wanted, found)
        )
    return (mx.exp(wanted) * (wanted - found)).sum(-1) * settings.temperature**2


def _with_rest(logs: Any) -> Any:
    import mlx.core as mx

    rest = mx.log(mx.maximum(1 - mx.exp(logs).sum(-1, keepdims=True), 1e-6))
    return mx.concatenate([logs, rest], -1)


def predict(network: Any, sequences: Sequence[list[int]]) -> Any:
    """Logits (all tokens, vocabulary) of what follows each token, float32."""
    import mlx.core as mx
    import numpy as np

    network.eval()
    return np.concatenate(
        [np.array(network(mx.array([ids]))[0].astype(mx.float32)) for ids in sequences]
    )


def _save(network: Any, optimizer: Any, losses: list[float], folder: Path, settings: Train) -> None:
    """A checkpoint; of earlier ones the last few stay."""
    import mlx.core as mx
    import mlx.utils

    _save_adapter(network, folder, settings)
    mx.save_safetensors(
        str(folder / "optimizer.safetensors"), dict(mlx.utils.tree_flatten(optimizer.state))
    )
    write_json(folder / "losses.json", losses)
    mark_complete(folder)
    old = sorted(folder.parent.glob("checkpoint-*"), key=lambda its: int(its.name.split("-")[1]))
    for gone in old[:-_KEPT]:
        shutil.rmtree(gone)


def _resume(network: Any, optimizer: Any, folder: Path) -> list[float]:
    """Go on from a checkpoint; the losses up to there."""
    import mlx.core as mx
    import mlx.utils

    _load_adapter(network, folder)
    state = mx.load(str(folder / "optimizer.safetensors"))
    optimizer.state = mlx.utils.tree_unflatten(list(state.items()))
    return list(json.loads((folder / "losses.json").read_text()))


def _pairs(network: Any) -> Iterator[tuple[str, str, Any]]:
    """PEFT's name, MLX's name, and the matrix: PEFT keeps it the other way round."""
    import mlx.utils

    for name, matrix in mlx.utils.tree_flatten(network.trainable_parameters()):
        module, side = name.rsplit(".lora_", 1)
        yield f"base_model.model.{module}.lora_{side.upper()}.weight", name, matrix


def _save_adapter(network: Any, folder: Path, settings: Train) -> None:
    """The adapter as PEFT writes it."""
    import mlx.core as mx

    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"),
        {theirs: mx.contiguous(matrix.T) for theirs, _, matrix in _pairs(network)},
        metadata={"format": "pt"},
    )
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": settings.rank,
            "lora_alpha": settings.alpha or settings.rank,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rslora,
            "target_modules": list(settings.target_modules),
        },
    )


def _load_adapter(network: Any, folder: Path) -> None:
    """The adapter as PEFT wrote it.

    Raises:
        GattError: there is none, or it has another rank or other targets.
    """
    import mlx.core as mx

    found = mx.load(str(adapter_weights(folder)))
    wanted = {theirs: (ours, matrix.T.shape) for theirs, ours, matrix in _pairs(network)}
    if {name: matrix.shape for name, matrix in found.items()} != {
        name: shape for name, (_, shape) in wanted.items()
    }:
        raise GattError(
            f"train.init_adapter: {folder} is of another rank, other targets or another base than the recipe's."
        )
    network.load_weights(
        [(ours, mx.contiguous(found[theirs].T)) for theirs, (ours, _) in wanted.items()],
        strict=False,
    )
