"""How long a training step takes here: a few random layers of a model's sizes train for a moment.

The loss is that of training. Not counted are bitsandbytes' dequantization where the base model has
no room dequantized (see `TrainingJob.dequantize`), and the optimizer.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from pipeline.hub.shape import ModelShape
from pipeline.recipe import Train
from pipeline.training.cpu.precision import cpu_dtype, has_bfloat16
from pipeline.training.examples import IGNORE_INDEX, TrainingExample

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from pipeline.training.loss import Batch, GattLoss

CPU_TOKENS_AT_A_TIME = 1024
"""On a CPU, micro-batches of more tokens are no faster and take more memory."""
TOKENS_PER_DIALOGUE = 500
"""Tokens of a usual dialogue, the least that is computed at a time."""
_LEARNED, _ALIGNED, _TEACHER = 0.5, 0.4, 0.9
"""Fractions of a dialogue's tokens that are learned and distilled, and length of the teacher's chat
as a fraction of it; as in the demo's training data."""
_BATCH = CPU_TOKENS_AT_A_TIME // TOKENS_PER_DIALOGUE
"""Dialogues in a micro-batch of a usual step."""
_VOCAB_ROWS = 16384
"""Rows of the probe's output layer: its time is proportional to them."""
_HEAD_SIZES = (128, 64, 32, 16, 8)
_RUNS, _MAX_SECONDS = 5, 8.0
"""Timed runs of the probe; fewer if they take longer than this."""


class StepTime(NamedTuple):
    """Estimated seconds of a training step, those of its matrix products, and learned tokens."""

    seconds: float
    product_seconds: float
    learned_tokens: int


def estimate_step(shape: ModelShape, settings: Train) -> StepTime:
    """Return the time of a step of `settings.batch_size` usual dialogues on this CPU."""
    from peft.helpers import disable_input_dtype_casting

    from pipeline.training.loss import GattLoss, collate

    class WithoutHead(GattLoss):
        """The sum of the hidden states instead of the loss."""

        def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
            hidden, is_target = self._hidden_states(
                batch["input_ids"], batch["labels"] != IGNORE_INDEX
            )
            if "alignment" in batch:
                self._teacher_states(batch, is_target)
            return hidden.float().sum()

    example = _usual_dialogue(distilled=settings.loss == "distill")
    layers = 1 if shape.hidden_size >= 2048 else 2
    rows = min(_VOCAB_ROWS, shape.vocab_size)
    model = _random_model(shape, settings, layers, rows)
    batch = collate([example] * _BATCH, 0)
    with disable_input_dtype_casting(model):
        decoder = _median_seconds(WithoutHead(model, settings), batch)
        full = _median_seconds(GattLoss(model, settings), batch)
    head = max(0.0, full - decoder) * shape.vocab_size / rows
    seconds = decoder * shape.num_hidden_layers / layers + head
    return StepTime(
        settings.batch_size * seconds / _BATCH,
        settings.batch_size * _flops(shape, example) / _flops_per_second(shape),
        settings.batch_size * example.learned_tokens,
    )


def _usual_dialogue(*, distilled: bool) -> TrainingExample:
    tokens = TOKENS_PER_DIALOGUE
    rng = random.Random(1)
    ids = [rng.randrange(1, 100) for _ in range(tokens)]
    start, shift = int(tokens * (1 - _LEARNED)), int(tokens * (1 - _TEACHER))
    aligned = range(start, start + int(tokens * _ALIGNED))
    return TrainingExample(
        input_ids=ids,
        labels=[IGNORE_INDEX] * start + ids[start:],
        weights=[0.0] * start + [1.0] * (tokens - start),
        teacher_ids=ids[shift:] if distilled else (),
        alignment=[(index, index - shift) for index in aligned] if distilled else (),
    )


def attention_heads(shape: ModelShape) -> tuple[int, int, int]:
    """Return the size of a head, and the numbers of query and of key-value heads.

    They come near the sizes of a model whose layers differ, as those of Gemma 4: its mean sizes
    have no common divisor.
    """
    divisors = (n for n in _HEAD_SIZES if not (shape.q_size % n or shape.kv_size % n))
    head_dim = next(divisors, _HEAD_SIZES[0])
    kv_heads = max(1, round(shape.kv_size / head_dim))
    groups = max(1, round(shape.q_size / head_dim / kv_heads))
    return head_dim, groups * kv_heads, kv_heads


def _random_model(shape: ModelShape, settings: Train, layers: int, rows: int) -> PeftModel:
    """Return a Llama of `layers` layers of the model's sizes, with the adapter."""
    import peft
    import transformers

    head_dim, heads, kv_heads = attention_heads(shape)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=rows,
        max_position_embeddings=2 * TOKENS_PER_DIALOGUE,
    )
    base = transformers.LlamaForCausalLM(config).to(cpu_dtype())
    lora = peft.LoraConfig(r=settings.rank, target_modules=list(settings.target_modules))
    model = peft.get_peft_model(base, lora)
    assert isinstance(model, peft.PeftModel)
    model.train()
    return model


def _median_seconds(loss: GattLoss, batch: Batch) -> float:
    """Return the seconds of forward and backward pass; a first run compiles kernels."""
    import torch

    seconds: list[float] = []
    begin = time.monotonic()
    while len(seconds) <= _RUNS and (len(seconds) < 2 or time.monotonic() - begin < _MAX_SECONDS):
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            value = loss(batch)
        value.backward()
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds[1:])


def _flops_per_second(shape: ModelShape) -> float:
    """Return the operations a second of a product with a matrix of the model."""
    import torch

    inputs = torch.rand(TOKENS_PER_DIALOGUE, shape.hidden_size).to(cpu_dtype())
    weight = torch.rand(shape.intermediate_size, shape.hidden_size).to(cpu_dtype())
    seconds: list[float] = []
    for _ in range(_RUNS + 1):
        start = time.monotonic()
        torch.nn.functional.linear(inputs, weight)
        seconds.append(time.monotonic() - start)
    flops = 2 * TOKENS_PER_DIALOGUE * shape.hidden_size * shape.intermediate_size
    return flops / statistics.median(seconds[1:])


def _flops(shape: ModelShape, example: TrainingExample) -> float:
    """Return the operations in matrix products with the base model's weights."""
    tokens, learned, aligned = (
        len(example.input_ids),
        example.learned_tokens,
        len(example.alignment),
    )
    # Forward, and backward for the inputs only; the teacher forward only.
    passes = 2 * tokens + len(example.teacher_ids)
    head = (2 * learned + aligned) * shape.vocab_size * shape.hidden_size
    return 2.0 * (passes * shape.projection_parameters + head)
