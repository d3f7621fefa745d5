"""What training takes in memory, from the sizes of a model. Constants of a CPU are fitted (scripts/bench/memory.py)."""

from __future__ import annotations

from pipeline.hub.models import presets, shape_of
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Train

GPU_SIZES_GB = (8, 12, 16, 24)
"""GB of graphics cards that people have; of these a twentieth is the screen's."""
TOKENS_PER_STEP, TOKENS_PER_DIALOGUE = 2000, 500
"""Tokens of a step of four dialogues, and of one, the least that is computed at a time."""
_FOUR_BITS = 0.516
"""Bytes of a weight in NF4: half a byte, and scales of blocks of 64, which are quantized themselves."""
_LOGITS = 0.25e9
"""Of the tokens whose logits are in memory at a time, and their gradients."""
_CUDA = 0.7e9
"""A CUDA context with the kernels of torch and bitsandbytes; not measured here."""
_WATCHED, _CELLS = 1.1, 6 * 1280
"""Bytes of a weight in Q8_0, as llama.cpp holds it, and cells of its cache for the dialogues of `dialogues.validation`."""
_DORA = 12
"""Bytes for each weight of the projections that a DoRA keeps for the way back: it computes whole matrices anew."""
_PROCESS, _KEPT = 0.7e9, 1.9
"""On a CPU: Python with torch and Unsloth, and how much more is kept than what autograd asks for: steps of many lengths leave
holes of many sizes."""


def training_memory(
    shape: ModelShape, settings: Train, tokens: int, gpu: bool = False, watched: bool = True
) -> float:
    """Bytes that a 4-bit QLoRA of `shape` takes at its peak, of a graphics card where `gpu`; `tokens` are computed at a time.
    Where checkpoints are `watched`, llama.cpp has the base beside it in the computer's memory.

    On a GPU Unsloth recomputes the layers and keeps what is between them in the computer's memory; there it is an estimate
    from the sizes alone.
    """
    weights = _FOUR_BITS * shape.projections + 2 * shape.embeddings
    # Weights, gradients and the two moments of AdamW in float32, and copies to compute with.
    trained = 26 * shape.adapter(settings) + (_DORA * shape.projections if settings.dora else 0)
    if gpu:
        whole = 2 * max(inputs * outputs for inputs, outputs in shape.matrices.values())
        return (
            _CUDA
            + weights
            + trained
            + whole
            + _LOGITS
            + 2 * tokens * shape.activation_bytes_per_token
        )
    llama = (
        _WATCHED * shape.parameters + 4 * _CELLS * shape.num_hidden_layers * shape.kv_size
        if watched
        else 0
    )
    return (
        _PROCESS
        + weights
        + trained
        + _LOGITS
        + llama
        + _KEPT * tokens * shape.num_hidden_layers * shape.activation_bytes_per_token
    )


def usable_bytes(card: float) -> float:
    """Bytes that training has on a card of so many GB."""
    return 0.95 * card * 1e9


def tokens_that_fit(shape: ModelShape, settings: Train, memory: float, gpu: bool = False) -> int:
    """How many tokens can be computed at a time in so many bytes; 0 or less where not even the model fits."""
    fixed = training_memory(shape, settings, 0, gpu)
    return int((memory - fixed) / (training_memory(shape, settings, 1, gpu) - fixed))


def largest_preset(memory: float, tokens: int, settings: Train, *, gpu: bool) -> str:
    """The base model of most parameters that can be trained in so many bytes with `tokens` at a time; "" is none."""
    shapes = {name: shape_of(name) for name in presets()}
    able = [
        name
        for name, shape in shapes.items()
        if training_memory(shape, settings, tokens, gpu) <= memory
    ]
    return max(able, key=lambda name: shapes[name].parameters, default="")
