"""The hyperparameters of each family as llama.cpp's converter names and computes them.

Keys are named by the methods of `gguf.GGUFWriter` ("context_length" is `add_context_length`).
Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

import math

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject

Keys = JsonObject


def rope_of(config: JsonObject) -> JsonObject:
    """Return the rotary settings of full attention.

    transformers 5 stores them in one table, earlier versions as keys of the configuration.
    """
    table = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope = dict(table.get("full_attention") or table)
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            rope.setdefault(key, config[key])
    rope.setdefault("rope_type", rope.get("type") or "default")
    return rope


def head_size(config: JsonObject) -> int:
    """Return the width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def common_keys(config: JsonObject) -> Keys:
    """Return the keys that most families have."""
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


def _scaling(config: JsonObject) -> Keys:
    """Return the keys of a scaled rotary embedding.

    Raises:
        GattError: a kind of scaling that llama.cpp has no keys for.
    """
    import gguf

    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # Llama 3 stores a tensor of factors instead
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
        f"A rotary embedding with {kind!r} scaling found; "
        "'llama3', 'linear', 'yarn' or 'longrope' expected."
    )


def llama_keys(config: JsonObject) -> Keys:
    return {
        **common_keys(config),
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": head_size(config),
    }


def qwen3_moe_keys(config: JsonObject) -> Keys:
    if not config.get("norm_topk_prob"):
        raise GattError(
            "A mixture of experts with norm_topk_prob = false found; "
            "llama.cpp always normalizes the experts' weights."
        )
    if not (config.get("num_local_experts") or config.get("num_experts")):
        raise KeyError("num_experts")
    return {**common_keys(config), "expert_feed_forward_length": config["moe_intermediate_size"]}


def gemma2_keys(config: JsonObject) -> Keys:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
        if not config[key]:
            raise GattError(f"A Gemma 2 without {key} found; llama.cpp always applies it.")
    keys = common_keys(config)
    keys.pop("rope_freq_base", None)
    return {
        **keys,
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "sliding_window": config["sliding_window"],
    }


def gemma3_keys(config: JsonObject) -> Keys:
    keys = {**common_keys(config), "rope_freq_base": rope_of(config).get("rope_theta", 1_000_000.0)}
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


def phi3_keys(config: JsonObject) -> Keys:
    rope = rope_of(config)
    keys = {
        name: value
        for name, value in common_keys(config).items()
        if name not in ("key_length", "value_length")
    }
    keys.pop("rope_scaling_type", None)
    original_context = (
        rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    keys |= {
        "rope_dimension_count": _phi3_dimensions(config),
        "rope_scaling_orig_ctx_len": original_context,
        "sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("long_factor"):
        scale = config["max_position_embeddings"] / original_context
        keys["rope_scaling_attn_factors"] = (
            math.sqrt(1 + math.log(scale) / math.log(original_context)) if scale > 1 else 1.0
        )
    return keys


def _phi3_dimensions(config: JsonObject) -> int:
    return int(rope_of(config).get("partial_rotary_factor", 1.0) * config["hidden_size"]) // int(
        config["num_attention_heads"]
    )
