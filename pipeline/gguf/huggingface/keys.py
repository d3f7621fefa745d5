"""The names of weights in checkpoints: of a text model within another one, and of what a GGUF
calls or divides otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

_RENAMED = {
    ".linear_attn.dt_bias": ".linear_attn.dt_proj.bias",
    ".layer_scalar": ".layer_scalar.weight",
}
"""Ends of names that `gguf`'s table of names has in another form."""
_WITHOUT_ENDING = ".A_log"
_MULTI_TOKEN = ("mtp.", "model.mtp.")
"""Layers that predict several tokens at once; transformers does not load them."""

_OF_TEXT = (
    *("lm_head.", "model.layers.", "model.embed_tokens.", "model.norm.", "model.embedding_norm."),
    *("model.embed_tokens_per_layer.", "model.per_layer_"),
)
"""The first parts of a text model's names where nothing stands before them."""
_IDEFICS = "model.text_model."


class Part(NamedTuple):
    """A matrix within a stored tensor: `rows` rows of the second last axis, from `first` on."""

    key: str
    first: int
    rows: int


def is_multi_token(key: str) -> bool:
    """Return whether a weight belongs to layers that predict several tokens at once."""
    return key.startswith(_MULTI_TOKEN)


def is_within(key: str) -> bool:
    """Return whether a weight is of a text model that stands within another model."""
    return "language_model." in key or key.startswith(_IDEFICS)


def text_model_key(key: str) -> str:
    """Return the key of a multimodal model's weight in its text model alone, "" for other parts.

    Checkpoints call the text model `language_model.model`, `model.language_model` (transformers 5
    in memory, and adapters) or `model.language_model.model`; LLaVA's and Mistral's have `lm_head`
    within `language_model`. Idefics and SmolVLM call it `model.text_model`.
    """
    if key.startswith(_IDEFICS):
        return f"model.{key.removeprefix(_IDEFICS)}"
    if not is_within(key):
        return key if key.startswith(_OF_TEXT) else ""
    part = key.rpartition("language_model.")[2]
    return part if part.startswith(("model.", "lm_head.")) else f"model.{part}"


def matrix_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a stored tensor in a GGUF: a convolution has one filter per channel."""
    return (shape[0], shape[-1]) if _is_convolution(key) and len(shape) == 3 else shape


def stored_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a checkpoint of what a GGUF stores in `shape`."""
    return (shape[0], 1, shape[-1]) if _is_convolution(key) and len(shape) == 2 else shape


def _is_convolution(key: str) -> bool:
    return ".conv.conv." in key or ".conv1d." in key


def full_key(key: str) -> str:
    """Return a stored tensor's name in the form that `gguf`'s table of names has."""
    for end, renamed in _RENAMED.items():
        if key.endswith(end):
            key = key.removesuffix(end) + renamed
    return key if key.endswith((".weight", ".bias", _WITHOUT_ENDING)) else f"{key}.weight"


def parts_of(key: str, shape: tuple[int, ...]) -> list[Part]:
    """Return the matrices in a stored tensor by their full keys.

    Experts may store gate and up as one.
    """
    rows, full = shape[-2] if len(shape) > 1 else shape[0], full_key(key)
    if ".experts." not in key or "gate_up_proj" not in key:
        return [Part(full, 0, rows)]
    half = rows // 2
    return [
        Part(full.replace("gate_up_proj", "gate_proj"), 0, half),
        Part(full.replace("gate_up_proj", "up_proj"), half, half),
    ]
