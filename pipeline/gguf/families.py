"""How each family of models is stored in GGUF: architecture, weights, and what it needs.

Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, JsonObject
from pipeline.gguf.huggingface.config import text_part, with_defaults
from pipeline.gguf.huggingface.hyperparameters import (
    Keys,
    common_keys,
    gemma2_keys,
    gemma3_keys,
    granite_keys,
    head_size,
    llama_keys,
    ministral3_keys,
    olmo2_keys,
    phi3_keys,
    qwen3_moe_keys,
    rope_of,
    smollm3_keys,
)

_NEEDED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
"""Keys of every family's configuration; transformers has defaults of them."""
_SIZES = ("model_type", "hidden_size", "num_hidden_layers")
"""Keys that every published configuration has."""
_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
_DENSE = (*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = (*_ATTENTION, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_POST_NORMS = ("post_attention_norm", "post_ffw_norm")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    `keys` returns its hyperparameters. Where it is `interleaved`, the rows of q and k stand in
    pairs (llama.cpp's rotary order), not in halves. `norm_shift` is added to the weights of norms,
    because Gemma multiplies by 1 + w. Where it is `without_head`, a stored output matrix repeats
    the embedding and is skipped. `text_model` is the `model_type` in the `text_config` of a
    multimodal model whose text part is of this family. `needs` are keys of the configuration that
    `_NEEDED` does not have, `matrices` the names of the weights that each layer has."""

    architecture: str
    keys: Callable[[JsonObject], Keys]
    text_model: str
    needs: tuple[str, ...] = ()
    matrices: tuple[str, ...] = _DENSE
    interleaved: bool = False
    norm_shift: float = 0.0
    without_head: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(
        architecture="llama", keys=llama_keys, text_model="llama", interleaved=True
    ),
    "MistralForCausalLM": Family(
        architecture="llama", keys=llama_keys, text_model="mistral", interleaved=True
    ),
    "Qwen2ForCausalLM": Family(architecture="qwen2", keys=common_keys, text_model="qwen2"),
    "Qwen3ForCausalLM": Family(
        architecture="qwen3",
        keys=common_keys,
        text_model="qwen3",
        needs=("head_dim",),
        matrices=(*_DENSE, *_QK_NORMS),
    ),
    "Qwen3MoeForCausalLM": Family(
        architecture="qwen3moe",
        keys=qwen3_moe_keys,
        text_model="qwen3_moe",
        needs=(
            "head_dim",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
        ),
        matrices=(*_EXPERTS, *_QK_NORMS),
    ),
    "Gemma2ForCausalLM": Family(
        architecture="gemma2",
        keys=gemma2_keys,
        text_model="gemma2",
        needs=(
            "head_dim",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
        ),
        matrices=(*_DENSE, *_POST_NORMS),
        norm_shift=1.0,
        without_head=True,
    ),
    "Gemma3ForCausalLM": Family(
        architecture="gemma3",
        keys=gemma3_keys,
        text_model="gemma3_text",
        needs=("head_dim", "sliding_window"),
        matrices=(*_DENSE, *_QK_NORMS, *_POST_NORMS),
        norm_shift=1.0,
    ),
    "Phi3ForCausalLM": Family(
        architecture="phi3",
        keys=phi3_keys,
        text_model="phi3",
        matrices=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    ),
    "SmolLM3ForCausalLM": Family(
        architecture="smollm3", keys=smollm3_keys, text_model="smollm3", interleaved=True
    ),
    "Olmo2ForCausalLM": Family(
        architecture="olmo2",
        keys=olmo2_keys,
        text_model="olmo2",
        needs=("tie_word_embeddings",),
        matrices=(*_MATRICES, *_QK_NORMS, *_POST_NORMS),
    ),
    "Olmo3ForCausalLM": Family(
        architecture="olmo2",
        keys=olmo2_keys,
        text_model="olmo3",
        needs=("tie_word_embeddings", "sliding_window"),
        matrices=(*_MATRICES, *_QK_NORMS, *_POST_NORMS),
    ),
    "GraniteForCausalLM": Family(
        architecture="granite",
        keys=granite_keys,
        text_model="granite",
        needs=(
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        interleaved=True,
    ),
    "Ministral3ForCausalLM": Family(
        architecture="mistral3",
        keys=ministral3_keys,
        text_model="ministral3",
        needs=("head_dim", "rope_parameters"),
        interleaved=True,
    ),
}
"""By the first of `architectures` in `config.json`."""
_TEXT_MODELS = {family.text_model: name for name, family in FAMILIES.items()}


class ModelConfig(NamedTuple):
    """What a checkpoint is: its family, transformers' class of its text part, and its settings.

    Where it is `multimodal`, its other parts are left out."""

    family: Family
    class_name: str
    settings: JsonObject
    multimodal: bool


def is_supported(config: JsonObject) -> bool:
    """Return whether a configuration names a family that this version writes."""
    return _class_name(config) in FAMILIES


def _class_name(config: JsonObject) -> str:
    """Return transformers' class of a model, or of the text part of a multimodal one."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    text = config.get("text_config")
    if name in FAMILIES or not isinstance(text, dict):
        return name
    return _TEXT_MODELS.get(str(text.get("model_type")), "")


def read_config(config: JsonObject, source: str) -> ModelConfig:
    """Return the family that a configuration names, and its settings with transformers' defaults.

    `source` is what error messages call the file.

    Raises:
        GattError: a family that is not supported, or a key that it needs is missing.
    """
    names, text = config.get("architectures"), config.get("text_config")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    multimodal = name not in FAMILIES and isinstance(text, dict)
    class_name = _class_name(config)
    if class_name not in FAMILIES:
        model_type = text.get("model_type") if isinstance(text, dict) else ""
        part = f" with the text model {str(model_type)!r}" if multimodal else ""
        raise GattError(
            f"{source} is a {name}{part}; this version trains and evaluates {', '.join(FAMILIES)}, "
            "and models whose text model is one of these. Give a GGUF of the model instead, if it "
            "is one of these. A folder of another architecture that llama.cpp reads is exported by "
            "`gatt export --model FOLDER --adapter LORA`, or with your own convert_hf_to_gguf.py "
            "by --converter PATH."
        )
    family, settings = FAMILIES[class_name], text_part(config)
    for key in _SIZES:
        if not settings.get(key):
            raise GattError(f"{source} lacks {key}. Download the checkpoint again.")
    settings = with_defaults(settings, (*_NEEDED, *family.needs), source)
    for key in (*_SIZES[1:], *_NEEDED):
        value = settings[key]
        if key != "num_key_value_heads" and not (isinstance(value, int | float) and value > 0):
            raise GattError(f"{source}: {key} = {value!r} found, a positive number expected.")
    return ModelConfig(family, class_name, settings, multimodal)


def require_tensors(
    family: Family, names: Collection[str], layers: int, source: str, *, tied: bool
) -> None:
    """Check that a model has all weights that its family needs, by llama.cpp's names.

    Where the output matrix is not `tied` to the embedding, it is needed too.

    Raises:
        GattError: one is missing.
    """
    needed = {"token_embd.weight": "the embedding", "output_norm.weight": "the last norm"}
    if not tied:
        needed["output.weight"] = "the output matrix (lm_head)"
    # A layer has what its family needs, and whatever another layer has.
    per_layer = {name.split(".", 2)[2] for name in names if name.startswith("blk.")}
    for part in sorted({f"{matrix}.weight" for matrix in family.matrices} | per_layer):
        for layer in range(layers):
            needed[f"blk.{layer}.{part}"] = f"{part.rpartition('.')[0]} of layer {layer}"
    missing = [text for name, text in needed.items() if name not in names]
    if missing:
        more = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        raise GattError(
            f"{source} is incomplete: {missing[0]}{more} missing. Download the model again."
        )


def extra_tensors(family: Family, config: JsonObject) -> dict[str, Array]:
    """Return tensors that no checkpoint holds: the factors of a scaled rotary embedding."""
    rope = rope_of(config)
    if family.architecture == "phi3" and rope.get("long_factor"):
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if family.architecture == "llama" and rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, head_size(config))}
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
