"""Tensors that no checkpoint holds: the factors of a scaled rotary embedding.

Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.gguf.base import Array, JsonObject
from pipeline.gguf.huggingface.hybrid_keys import global_head_size
from pipeline.gguf.huggingface.hyperparameters import head_size, rope_of

_NOT_ROTATED = 1e30
"""Divides the frequency of dimensions that Gemma 4 does not rotate."""


def extra_tensors(architecture: str, config: JsonObject) -> dict[str, Array]:
    """Return the factors of a model's rotary embedding by the names of their tensors."""
    rope = rope_of(config)
    if architecture == "phi3" and rope.get("long_factor"):
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if architecture in ("llama", "mistral3") and rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, head_size(config))}
    if architecture == "gemma4":
        size = global_head_size(config)
        rotated = int(size * rope.get("partial_rotary_factor", 1.0) / 2)
        factors = [1.0] * rotated + [_NOT_ROTATED] * (size // 2 - rotated)
        return {"rope_freqs.weight": np.array(factors, np.float32)}
    return {}


def llama3_factors(rope: JsonObject, size: int) -> Array:
    """Return Llama 3's frequency factors (Llama 3.1 model card; transformers' `rope_type =
    "llama3"`).
    """
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.float32(1) / np.float32(rope["rope_theta"]) ** exponents
    wavelengths = (2 * math.pi / frequencies).astype(np.float32)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    ratio = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    factors: Array = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
