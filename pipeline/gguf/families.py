"""How each family of models stands in GGUF: architecture, hyperparameters, and what changes in its weights.

Source: llama.cpp's converter as it comes with llama-cpp-python 0.3.36; the tests compare with it key by key and byte by byte.
Keys are named by the methods of `gguf.GGUFWriter` ("context_length" is `add_context_length`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array

Config = dict[str, Any]
Keys = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of llama.cpp.

    `keys` makes its hyperparameters; `interleaved`: the rows of q and k stand in pairs (llama.cpp's rotary order) and not in
    halves; `norm_shift` is added to the weights of norms (Gemma multiplies by 1 + w); `without_head`: a stored output matrix is
    the embedding once more, and left out.
    """

    architecture: str
    keys: Callable[[Config], Keys]
    interleaved: bool = False
    norm_shift: float = 0.0
    without_head: bool = False


def rope_of(config: Config) -> Config:
    """The rotary settings of full attention: one table since transformers 5, keys of the configuration before."""
    table = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = dict(table.get("full_attention") or table)
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    rope.setdefault("rope_type", rope.get("type") or "default")
    return rope


def head_size(config: Config) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _common(config: Config) -> Keys:
    """What most families have."""
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings"),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("intermediate_size"),
        "head_count": config["num_attention_heads"],
        "head_count_kv": config.get("num_key_value_heads"),
        "layer_norm_rms_eps": config.get("rms_norm_eps"),
        "rope_freq_base": rope_of(config).get("rope_theta"),
        "key_length": config.get("head_dim"),
        "value_length": config.get("head_dim"),
        "expert_count": config.get("num_local_experts") or config.get("num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
    }
    return {
        name: value for name, value in {**keys, **_scaling(config)}.items() if value is not None
    }


def _scaling(config: Config) -> Keys:
    """The keys of a stretched rotary embedding.

    Raises:
        GattError: a kind of stretching that llama.cpp does not know by keys.
    """
    import gguf

    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # Llama 3 has a tensor of factors instead
        return {}
    if kind == "linear":
        return {
            "rope_scaling_type": gguf.RopeScalingType.LINEAR,
            "rope_scaling_factor": rope["factor"],
        }
    if kind == "yarn":
        return {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            "rope_scaling_yarn_ext_factor": rope.get("extrapolation_factor"),
            "rope_scaling_yarn_attn_factor": rope.get("attention_factor", rope.get("attn_factor")),
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast"),
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow"),
        }
    if kind in ("longrope", "su"):
        return {"rope_scaling_type": gguf.RopeScalingType.LONGROPE}
    raise GattError(
        f"A rotary embedding scaled by {kind!r} found; 'llama3', 'linear', 'yarn' or 'longrope' expected."
    )


def _llama(config: Config) -> Keys:
    return {
        **_common(config),
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": head_size(config),
    }


def _qwen3_moe(config: Config) -> Keys:
    if not config.get("norm_topk_prob"):
        raise GattError(
            "A mixture of experts with norm_topk_prob = false found; llama.cpp always normalizes the experts' shares."
        )
    return {**_common(config), "expert_feed_forward_length": config["moe_intermediate_size"]}


def _gemma2(config: Config) -> Keys:
    keys = _common(config)
    keys.pop("rope_freq_base", None)
    return {
        **keys,
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "sliding_window": config["sliding_window"],
    }


def _gemma3(config: Config) -> Keys:
    keys = {**_common(config), "rope_freq_base": rope_of(config).get("rope_theta", 1_000_000.0)}
    table = config.get("rope_parameters") or {}
    local = (table.get("sliding_attention") or {}).get(
        "rope_theta", config.get("rope_local_base_freq")
    )
    if local is not None:
        keys["rope_freq_base_swa"] = local
    if config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = config["final_logit_softcapping"]
    if config.get("sliding_window_pattern") != 1:
        keys["sliding_window"] = config["sliding_window"]
    return keys


def _phi3(config: Config) -> Keys:
    rope = rope_of(config)
    keys = {
        name: value
        for name, value in _common(config).items()
        if name not in ("key_length", "value_length")
    }
    keys.pop("rope_scaling_type", None)
    before = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    keys |= {
        "rope_dimension_count": _phi3_dimensions(config),
        "rope_scaling_orig_ctx_len": before,
        "sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("long_factor"):
        scale = config["max_position_embeddings"] / before
        keys["rope_scaling_attn_factors"] = (
            math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
        )
    return keys


def _phi3_dimensions(config: Config) -> int:
    return int(rope_of(config).get("partial_rotary_factor", 1.0) * config["hidden_size"]) // int(
        config["num_attention_heads"]
    )


FAMILIES = {
    "LlamaForCausalLM": Family("llama", _llama, interleaved=True),
    "MistralForCausalLM": Family("llama", _llama, interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2", _common),
    "Qwen3ForCausalLM": Family("qwen3", _common),
    "Qwen3MoeForCausalLM": Family("qwen3moe", _qwen3_moe),
    "Gemma2ForCausalLM": Family("gemma2", _gemma2, norm_shift=1.0, without_head=True),
    "Gemma3ForCausalLM": Family("gemma3", _gemma3, norm_shift=1.0),
    "Phi3ForCausalLM": Family("phi3", _phi3),
}
"""By the first of `architectures` in `config.json`."""


def family_of(config: Config, source: str) -> Family:
    """The family that a configuration names.

    Raises:
        GattError: one that is not known here.
    """
    named = (config.get("architectures") or ["none"])[0]
    if named not in FAMILIES:
        raise GattError(
            f"{source} is a {named}; this version writes GGUF for {', '.join(FAMILIES)}. Give the model's GGUF instead, where it "
            "is of one of these, or export a folder with `gatt export --model FOLDER --converter PATH` and your own "
            "convert_hf_to_gguf.py of llama.cpp."
        )
    return FAMILIES[named]


def extra_tensors(family: Family, config: Config) -> dict[str, Array]:
    """Tensors that no checkpoint holds: the factors by which a rotary embedding is stretched."""
    rope = rope_of(config)
    if family.architecture == "phi3" and rope.get("long_factor"):
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    if family.architecture == "llama" and rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_size(config))}
    return {}


def _llama3_factors(rope: Config, size: int) -> Array:
    """Llama 3's frequency factors (Llama 3.1 model card; transformers' `rope_type = "llama3"`)."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.float32(1) / np.float32(rope["rope_theta"]) ** exponents
    wavelengths = (2 * math.pi / frequencies).astype(np.float32)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    ratio = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    factors: Array = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
