"""Predict the memory that training takes from the sizes of a model, before anything is loaded.

The constants for a CPU are fitted to peaks measured in bfloat16 (`scripts/bench/memory.py`). Those
for a GPU are counted, and compared with the table that Unsloth publishes; they were not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.hub.models import shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Recipe, Train
from pipeline.system import GB
from pipeline.training import mlx
from pipeline.training.cpu.precision import has_bfloat16
from pipeline.training.cpu.speed import CPU_TOKENS_AT_A_TIME
from pipeline.training.job import LOGITS_PER_CHUNK, loads_in_4bit, world_size

GPU_SIZES_GB = (6, 8, 12, 16, 24)
"""GB of common graphics cards."""
_USABLE_GPU_FRACTION = 0.92
"""Fraction of a graphics card that training can take; the rest is the driver's and the screen's."""
TOKENS_PER_STEP = 2000
"""Tokens of a usual step: four dialogues."""

_NF4_BYTES_PER_WEIGHT = 0.516
"""Half a byte, and the scales of blocks of 64 weights, which are quantized themselves."""
_BYTES_IN_16_BITS, _BYTES_IN_FLOAT32 = 2, 4
"""Of activations and weights that are not quantized, and of a matrix that is dequantized."""
_CPU_ADAPTER_BYTES_PER_WEIGHT = 26
"""Weight, gradient and AdamW's two moments in float32, and copies to compute with."""
_GPU_ADAPTER_BYTES_PER_WEIGHT = {"adamw": 16, "adamw_8bit": 10}
"""Weight, gradient and two moments; the copies to compute with are one layer's at a time."""
_DORA_BYTES_PER_WEIGHT = 12
"""Per weight of the base model's projections: DoRA computes full matrices and saves them."""
_LOGITS_BYTES = 0.25e9
"""On a CPU: one chunk of logits (see `loss`) with its gradients."""
_BYTES_PER_LOGIT = 40
"""On a GPU: the same for each logit; measured on a CPU with "distill", cross-entropy takes 16."""
_LOGITS_FRACTION = 0.1
"""Fraction of a GPU's free memory that a chunk of logits may take."""
_MAX_LOGITS_PER_CHUNK = 2**26
"""A larger chunk is no faster: reading the output layer takes less time than multiplying."""
_CUDA_BYTES = 0.7e9
"""A CUDA context with the kernels of torch and bitsandbytes; an estimate, not measured."""
_PROCESS_BYTES = 0.6e9
"""On a CPU: Python with torch, Unsloth and the kernels that they keep."""
_GPU_ACTIVATION_OVERHEAD = 1.2
"""On a GPU: what the layer at hand takes over what it saves, gradients included."""
_PLANNED_GPU_FRACTION = 0.9
"""Fraction of a GPU's free memory that layers may fill with activations that need not be kept: the
prediction is an estimate."""
_PLANNED_CPU_FRACTION = 0.8
"""Fraction of a computer's free memory up to which the base model is kept dequantized too."""
_ACTIVATION_OVERHEAD = 1.9
"""On a CPU: heap growth over what autograd saves; steps of many lengths fragment the heap."""
_VALIDATION_BYTES_PER_WEIGHT = 1.1
"""The base model in Q8_0, as llama.cpp holds it to validate checkpoints."""
_VALIDATION_CELLS = 6 * 1280
"""Cells of llama.cpp's KV cache for the default of `dialogues.validation`."""
_KV_BYTES_PER_CELL = 4
"""A key and a value in float16, per layer and feature."""


class TrainingPlan(NamedTuple):
    """How training uses the memory at hand; see `TrainingJob`."""

    settings: Train
    stored_layers: int = 0
    logits_per_chunk: int = LOGITS_PER_CHUNK
    dequantize: bool = False


def training_memory(
    shape: ModelShape,
    settings: Train,
    tokens: int,
    *,
    gpu: bool = False,
    validation: bool = True,
) -> float:
    """Return the peak bytes of training `shape` with `tokens` computed at a time.

    With `gpu`, they are bytes of the graphics card: an estimate from the sizes alone, with the
    smallest chunk of logits and all layers checkpointed. With `validation`, llama.cpp holds the
    base model in the computer's memory meanwhile.
    """
    adapter = shape.adapter_parameters(settings)
    in_4bit = loads_in_4bit(settings, shape)
    value_bytes = _BYTES_IN_16_BITS if gpu else _cpu_value_bytes()
    per_weight = _NF4_BYTES_PER_WEIGHT if in_4bit else value_bytes
    if settings.dora:
        per_weight += _DORA_BYTES_PER_WEIGHT
    weights = per_weight * shape.projection_parameters + value_bytes * shape.embedding_parameters
    activations = tokens * shape.activation_bytes_per_token(value_bytes)
    if gpu:
        largest = max(inputs * outputs for inputs, outputs in shape.projection_shapes.values())
        # Unsloth recomputes each layer in the backward pass and offloads what lies between layers.
        return (
            _CUDA_BYTES
            + weights
            + _GPU_ADAPTER_BYTES_PER_WEIGHT[settings.optimizer] * adapter
            + (_BYTES_IN_16_BITS * largest if in_4bit else 0)
            + _BYTES_PER_LOGIT * LOGITS_PER_CHUNK
            + _GPU_ACTIVATION_OVERHEAD * activations
        )
    return (
        _PROCESS_BYTES
        + weights
        + _CPU_ADAPTER_BYTES_PER_WEIGHT * adapter
        + _LOGITS_BYTES
        + (_validation_memory(shape) if validation else 0)
        + _ACTIVATION_OVERHEAD * shape.num_hidden_layers * activations
    )


def _validation_memory(shape: ModelShape) -> float:
    kv_cache = _KV_BYTES_PER_CELL * _VALIDATION_CELLS * shape.num_hidden_layers * shape.kv_size
    return _VALIDATION_BYTES_PER_WEIGHT * shape.parameters + kv_cache


def dequantized_bytes(shape: ModelShape) -> float:
    """Return the bytes of the projections on a CPU; see `TrainingJob.dequantize`."""
    return _cpu_value_bytes() * shape.projection_parameters


def _cpu_value_bytes() -> int:
    """Return the bytes of what a CPU computes with; MLX computes in 16 bits everywhere."""
    return _BYTES_IN_16_BITS if mlx.available() or has_bfloat16() else _BYTES_IN_FLOAT32


def usable_bytes(gpu_size_gb: float) -> float:
    """Return the bytes that training can take on a graphics card."""
    return _USABLE_GPU_FRACTION * gpu_size_gb * 2**30  # makers count in powers of two


def tokens_that_fit(
    shape: ModelShape, settings: Train, memory_bytes: float, *, gpu: bool = False
) -> int:
    """Return how many tokens can be computed at a time; 0 or less if not even the model fits."""
    fixed = training_memory(shape, settings, 0, gpu=gpu)
    per_token = training_memory(shape, settings, 1, gpu=gpu) - fixed
    return int((memory_bytes - fixed) / per_token)


def fit_to_memory(
    recipe: Recipe, longest: int, free_bytes: float, *, gpu: bool, taken_bytes: float = 0
) -> TrainingPlan:
    """Return how to train with the memory at hand.

    A step is split into micro-batches where it does not fit. On a GPU, layers keep their
    activations as far as memory allows, and the others are computed again in the backward pass.
    `longest` is the number of tokens of the longest dialogue, `taken_bytes` what validation will
    take of the free ones on the GPU.

    Raises:
        GattError: not even the longest dialogue fits.
    """
    shape, settings = shape_of(recipe.model), recipe.train
    free = (free_bytes - taken_bytes) / (1 if gpu else world_size())  # CPUs share the memory
    step_tokens = (
        settings.max_tokens_per_micro_batch or settings.batch_size // world_size() * longest
    )
    tokens = step_tokens
    if not (gpu or settings.max_tokens_per_micro_batch):
        tokens = min(step_tokens, max(longest, CPU_TOKENS_AT_A_TIME))
    fit = tokens_that_fit(shape, settings, free, gpu=gpu)
    if fit < longest:
        needed = training_memory(shape, settings, longest, gpu=gpu)
        raise GattError(
            f"Too little memory to train {recipe.model}: {needed / GB:.1f} GB needed for a "
            f"dialogue of {longest} tokens, {free / GB:.1f} GB free. Close other programs, lower "
            f"train.max_length{_smaller_optimizer(settings, gpu=gpu)}, or take a smaller model "
            "(`gatt doctor` lists what fits)."
        )
    at_a_time = min(fit, tokens)
    if at_a_time < step_tokens:
        settings = settings.model_copy(update={"max_tokens_per_micro_batch": at_a_time})
    plan = TrainingPlan(settings)
    needed = training_memory(shape, settings, at_a_time, gpu=gpu)
    if gpu:
        plan = _use_spare_memory(plan, shape, at_a_time, free)
    elif loads_in_4bit(settings, shape) and not settings.dora:
        is_small = needed + dequantized_bytes(shape) <= _PLANNED_CPU_FRACTION * free
        plan = plan._replace(dequantize=is_small)
    needed += _spare_bytes(plan, shape, at_a_time)
    text = f"train: about {needed / GB:.1f} GB of {free / GB:.1f}" + (" (estimated)" if gpu else "")
    log(text if fit >= tokens else f"{text}, {fit} tokens at a time")
    return plan


def _smaller_optimizer(settings: Train, *, gpu: bool) -> str:
    can_shrink = gpu and settings.optimizer == "adamw"
    return ', set train.optimizer = "adamw_8bit"' if can_shrink else ""


def _use_spare_memory(
    plan: TrainingPlan, shape: ModelShape, tokens: int, free_bytes: float
) -> TrainingPlan:
    """Enlarge the chunk of logits and keep activations, as far as a GPU's free memory allows."""
    spare = _PLANNED_GPU_FRACTION * free_bytes - training_memory(
        shape, plan.settings, tokens, gpu=True
    )
    logits_per_chunk = LOGITS_PER_CHUNK
    while (
        2 * logits_per_chunk <= _MAX_LOGITS_PER_CHUNK
        and 2 * logits_per_chunk * _BYTES_PER_LOGIT <= min(spare, _LOGITS_FRACTION * free_bytes)
    ):
        logits_per_chunk *= 2
    plan = plan._replace(logits_per_chunk=logits_per_chunk)
    per_layer = _layer_bytes(shape, tokens)
    layers = int((spare - _spare_bytes(plan, shape, tokens)) / per_layer)
    return plan._replace(stored_layers=min(max(layers, 0), shape.num_hidden_layers))


def _spare_bytes(plan: TrainingPlan, shape: ModelShape, tokens: int) -> float:
    """Return the bytes that `plan` takes beyond `training_memory`."""
    weights = dequantized_bytes(shape) if plan.dequantize else 0
    logits = _BYTES_PER_LOGIT * (plan.logits_per_chunk - LOGITS_PER_CHUNK)
    return weights + logits + plan.stored_layers * _layer_bytes(shape, tokens)


def _layer_bytes(shape: ModelShape, tokens: int) -> int:
    """Return the bytes that a layer keeps of `tokens` on a GPU."""
    return tokens * shape.activation_bytes_per_token(_BYTES_IN_16_BITS)


def largest_preset(memory_bytes: float, tokens: int, settings: Train, *, gpu: bool) -> str:
    """Return the preset with the most parameters that trains with `tokens` at a time, or ""."""
    shapes = {name: shape_of(name) for name in presets()}
    fitting = [
        name
        for name, shape in shapes.items()
        if training_memory(shape, settings, tokens, gpu=gpu) <= memory_bytes
    ]
    return max(fitting, key=lambda name: shapes[name].parameters, default="")


def describe_choice(name: str, gpu_size_gb: float, settings: Train) -> str:
    """Return why a preset was chosen for a graphics card, and what its maker says of it."""
    preset = presets()[name]
    needed = training_memory(preset.shape, settings, TOKENS_PER_STEP, gpu=True) / GB
    thinking = {
        "switchable": "it can think, which is switched off",
        "no": "it does not think",
    }[preset.thinking]
    return (
        f"{name} ({preset.repository}, {preset.shape.parameters / 1e9:.1f} B parameters) is the "
        f"largest preset whose training is predicted to fit: {needed:.1f} of the "
        f"{usable_bytes(gpu_size_gb) / GB:.1f} GB that a card of {gpu_size_gb:g} GB leaves "
        f"(estimated from its sizes). License {preset.license}, {preset.context:,} tokens of "
        f"context, {thinking}."
    )
