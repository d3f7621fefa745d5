"""The loss of `loss` in MLX: the same values, with the logits of all learned tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.recipe import Train
from pipeline.training import loss
from pipeline.training.examples import IGNORE_INDEX, TrainingExample

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn

Batch = dict[str, "mx.array"]
"""The tensors of `loss.Batch`."""


def collate(examples: Sequence[TrainingExample]) -> Batch:
    """Pad `examples` to arrays of shape (batch, tokens)."""
    import mlx.core as mx

    batch = loss.collate(examples, pad_token_id=0)
    arrays = {
        "input_ids": mx.array(batch["input_ids"].numpy()),
        "labels": mx.array(batch["labels"].numpy()),
        "weights": mx.array(batch["weights"].numpy()),
    }
    if "alignment" in batch:
        arrays["teacher_ids"] = mx.array(batch["teacher_ids"].numpy())
        arrays["alignment"] = mx.array(batch["alignment"].numpy())
    return arrays


def gatt_loss(
    model: mlx.nn.Module,
    batch: Batch,
    teacher_logits: mx.array | None,
    settings: Train,
    total_weight: float,
) -> mx.array:
    """Return the loss of a batch, a scalar, as `loss.gatt_loss`.

    `teacher_logits` (aligned tokens, vocab_size) are given, because MLX differentiates all that is
    computed here.
    """
    import mlx.core as mx
    import mlx.nn
    import numpy as np

    labels, weights = batch["labels"], np.array(batch["weights"])
    rows, previous = np.nonzero(np.array(labels)[:, 1:] != IGNORE_INDEX)
    logits = model(batch["input_ids"])[mx.array(rows), mx.array(previous)].astype(mx.float32)
    losses = mlx.nn.losses.cross_entropy(logits, labels[mx.array(rows), mx.array(previous + 1)])
    weights = weights[rows, previous + 1]
    if teacher_logits is None:
        return (losses * mx.array(weights)).sum() / total_weight
    position = np.full(labels.shape, -1)
    position[rows, previous + 1] = np.arange(len(rows))
    row, student_index, _ = np.array(batch["alignment"])
    student = position[row, student_index]
    is_learned = student >= 0
    aligned = student[is_learned]
    kl = kl_divergence(
        teacher_logits[mx.array(np.nonzero(is_learned)[0])], logits[mx.array(aligned)], settings
    )
    kl_weights = weights[aligned] * (1 - settings.cross_entropy)
    weights[aligned] *= settings.cross_entropy
    return ((losses * mx.array(weights)).sum() + (kl * mx.array(kl_weights)).sum()) / total_weight


def teacher_logits(model: mlx.nn.Module, batch: Batch) -> mx.array | None:
    """Return the base model's logits (aligned tokens, vocab_size), given the teacher's prompt.

    The adapter is switched off meanwhile. None if `batch` aligns no token.
    """
    import mlx.core as mx

    if "alignment" not in batch:
        return None
    row, _, teacher_index = batch["alignment"]
    adapted = [module for _, module in model.named_modules() if "lora_a" in module]
    scales = [module.scale for module in adapted]
    model.eval()
    try:
        for module in adapted:
            module.scale = 0.0
        logits = model(batch["teacher_ids"])[row, teacher_index - 1].astype(mx.float32)
        mx.eval(logits)
    finally:
        for module, scale in zip(adapted, scales, strict=True):
            module.scale = scale
        model.train()
    return logits


def kl_divergence(teacher_logits: mx.array, logits: mx.array, settings: Train) -> mx.array:
    """Return KL(teacher‖model) of each token, shape (tokens), from logits (tokens, vocab_size)."""
    import mlx.core as mx

    teacher_logprobs = _log_softmax(teacher_logits / settings.temperature)
    logprobs = _log_softmax(logits / settings.temperature)
    if settings.top_k and settings.top_k < logits.shape[-1]:
        order = mx.argpartition(-teacher_logprobs, settings.top_k - 1, axis=-1)
        most_likely = order[:, : settings.top_k]
        teacher_logprobs = _append_rest(mx.take_along_axis(teacher_logprobs, most_likely, axis=-1))
        logprobs = _append_rest(mx.take_along_axis(logprobs, most_likely, axis=-1))
    kl = (mx.exp(teacher_logprobs) * (teacher_logprobs - logprobs)).sum(-1)
    return kl * settings.temperature**2


def _log_softmax(logits: mx.array) -> mx.array:
    import mlx.core as mx

    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _append_rest(logprobs: mx.array) -> mx.array:
    """Append to log-probabilities (tokens, k) that of all other tokens: (tokens, k + 1)."""
    import mlx.core as mx

    rest = mx.log(mx.maximum(1 - mx.exp(logprobs).sum(-1, keepdims=True), 1e-6))
    return mx.concatenate([logprobs, rest], -1)
