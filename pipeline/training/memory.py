"""Predict the memory that training takes from the sizes of a model, before anything is loaded.

The constants for a CPU are fitted to measured peaks (`scripts/bench/memory.py`).
"""

from __future__ import annotations

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.hub.models import shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Recipe, Train
from pipeline.system import GB
from pipeline.training.job import world_size

GPU_SIZES_GB = (8, 12, 16, 24)
"""GB of common graphics cards."""
_USABLE_GPU_FRACTION = 0.95
"""Fraction of a graphics card that training can take; the rest is the screen's."""
TOKENS_PER_STEP = 2000
"""Tokens of a usual step: four dialogues."""
TOKENS_PER_DIALOGUE = 500
"""Tokens of a usual dialogue, the least that is computed at a time."""

_NF4_BYTES_PER_WEIGHT = 0.516
"""Half a byte, and the scales of blocks of 64 weights, which are quantized themselves."""
_BF16_BYTES_PER_WEIGHT = 2
"""Of weights that are not quantized, and of a matrix that is dequantized to compute with."""
_ADAPTER_BYTES_PER_WEIGHT = 26
"""Weight, gradient and AdamW's two moments in float32, and copies to compute with."""
_DORA_BYTES_PER_WEIGHT = 12
"""Per weight of the base model's projections: DoRA computes full matrices and saves them."""
_LOGITS_BYTES = 0.25e9
"""One chunk of logits (see `loss`) with its gradients."""
_CUDA_BYTES = 0.7e9
"""A CUDA context with the kernels of torch and bitsandbytes; an estimate, not measured."""
_PROCESS_BYTES = 0.7e9
"""On a CPU: Python with torch and Unsloth loaded."""
_ACTIVATION_OVERHEAD = 1.9
"""On a CPU: heap growth over what autograd saves; steps of many lengths fragment the heap."""
_VALIDATION_BYTES_PER_WEIGHT = 1.1
"""The base model in Q8_0, as llama.cpp holds it to validate checkpoints."""
_VALIDATION_CELLS = 6 * 1280
"""Cells of llama.cpp's KV cache for the default of `dialogues.validation`."""
_KV_BYTES_PER_CELL = 4
"""A key and a value in float16, per layer and feature."""


def training_memory(
    shape: ModelShape,
    settings: Train,
    tokens: int,
    *,
    gpu: bool = False,
    validation: bool = True,
) -> float:
    """Return the peak bytes of a 4-bit QLoRA of `shape` with `tokens` computed at a time.

    With `gpu`, they are bytes of the graphics card: an estimate from the sizes alone. With
    `validation`, llama.cpp holds the base model in the computer's memory meanwhile.
    """
    fixed = (
        _NF4_BYTES_PER_WEIGHT * shape.projection_parameters
        + _BF16_BYTES_PER_WEIGHT * shape.embedding_parameters
        + _ADAPTER_BYTES_PER_WEIGHT * shape.adapter_parameters(settings)
        + (_DORA_BYTES_PER_WEIGHT * shape.projection_parameters if settings.dora else 0)
        + _LOGITS_BYTES
    )
    if gpu:
        largest = max(inputs * outputs for inputs, outputs in shape.projection_shapes.values())
        # Unsloth recomputes each layer in the backward pass and offloads what lies between layers.
        activations = 2 * tokens * shape.activation_bytes_per_token
        return _CUDA_BYTES + fixed + _BF16_BYTES_PER_WEIGHT * largest + activations
    activations = tokens * shape.num_hidden_layers * shape.activation_bytes_per_token
    llama = _validation_memory(shape) if validation else 0
    return _PROCESS_BYTES + fixed + llama + _ACTIVATION_OVERHEAD * activations


def _validation_memory(shape: ModelShape) -> float:
    kv_cache = _KV_BYTES_PER_CELL * _VALIDATION_CELLS * shape.num_hidden_layers * shape.kv_size
    return _VALIDATION_BYTES_PER_WEIGHT * shape.parameters + kv_cache


def usable_bytes(gpu_size_gb: float) -> float:
    """Return the bytes that training can take on a graphics card."""
    return _USABLE_GPU_FRACTION * gpu_size_gb * 1e9


def tokens_that_fit(
    shape: ModelShape, settings: Train, memory_bytes: float, *, gpu: bool = False
) -> int:
    """Return how many tokens can be computed at a time; 0 or less if not even the model fits."""
    fixed = training_memory(shape, settings, 0, gpu=gpu)
    per_token = training_memory(shape, settings, 1, gpu=gpu) - fixed
    return int((memory_bytes - fixed) / per_token)


def fit_to_memory(recipe: Recipe, longest: int, free_bytes: float, *, gpu: bool) -> Train:
    """Return the recipe's settings, with micro-batches where a full step does not fit in memory.

    `longest` is the number of tokens of the longest dialogue.

    Raises:
        GattError: not even the longest dialogue fits.
    """
    settings, shape = recipe.train, shape_of(recipe.model)
    free = free_bytes / (1 if gpu else world_size())  # processes on CPUs share the memory
    tokens = settings.max_tokens_per_micro_batch or settings.batch_size // world_size() * longest
    fit = tokens_that_fit(shape, settings, free, gpu=gpu)
    if fit < longest:
        needed = training_memory(shape, settings, longest, gpu=gpu)
        raise GattError(
            f"Too little memory to train {recipe.model}: {needed / GB:.1f} GB needed for a "
            f"dialogue of {longest} tokens, {free / GB:.1f} GB free. Close other programs, lower "
            "train.max_length, or take a smaller model (`gatt doctor` lists what fits)."
        )
    needed = training_memory(shape, settings, min(fit, tokens), gpu=gpu)
    text = f"train: about {needed / GB:.1f} GB of {free / GB:.1f}"
    if fit >= tokens:
        log(text)
        return settings
    log(f"{text}, {fit} tokens at a time")
    return settings.model_copy(update={"max_tokens_per_micro_batch": fit})


def largest_preset(memory_bytes: float, tokens: int, settings: Train, *, gpu: bool) -> str:
    """Return the preset with the most parameters that trains with `tokens` at a time, or ""."""
    shapes = {name: shape_of(name) for name in presets()}
    fitting = [
        name
        for name, shape in shapes.items()
        if training_memory(shape, settings, tokens, gpu=gpu) <= memory_bytes
    ]
    return max(fitting, key=lambda name: shapes[name].parameters, default="")
