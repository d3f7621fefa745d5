"""The hyperparameters of each family as llama.cpp's converter names and computes them.

Keys are named by the methods of `gguf.GGUFWriter` ("context_length" is `add_context_length`).
Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

import math

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject

Keys = JsonObject
_WITHOUT_ROPE = 4
"""Of so many layers of SmolLM3 one has no rotary embedding in llama.cpp."""


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
        _require_yarn(config, rope)
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


def _require_yarn(config: JsonObject, rope: JsonObject) -> None:
    """Check that llama.cpp scales attention as transformers does; no key of a GGUF changes that.

    Source: `llama_context` of llama.cpp, `_compute_yarn_parameters` of transformers.
    """

    def scale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0

    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    ratio = scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
    factor = rope.get("attention_factor") or ratio
    expected = scale(1.0)
    if config.get("model_type") == "ministral3":
        expected /= scale(mscale_all or 0.0)
    if abs(factor - expected) > 1e-3 or rope.get("truncate") is False:
        raise GattError(
            f"A rotary embedding with 'yarn' scaling found that multiplies attention by "
            f"{factor:.4f}, with truncate = {rope.get('truncate', True)}; llama.cpp multiplies by "
            f"{expected:.4f} and truncates. Take a model without attention_factor and truncate."
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


def smollm3_keys(config: JsonObject) -> Keys:
    step = config.get("no_rope_layer_interval") or _WITHOUT_ROPE
    layers = range(1, config["num_hidden_layers"] + 1)
    rotated = config.get("no_rope_layers") or [int(layer % step != 0) for layer in layers]
    if list(map(bool, rotated)) != [layer % _WITHOUT_ROPE != 0 for layer in layers]:
        raise GattError(
            f"A SmolLM3 with no_rope_layers = {rotated} found; llama.cpp leaves out the rotary "
            f"embedding of each {_WITHOUT_ROPE}th layer, and of no other."
        )
    refuse(config, "SmolLM3", ("use_sliding_window", "attention_bias", "mlp_bias"))
    return llama_keys(config)


def olmo2_keys(config: JsonObject) -> Keys:
    """Return the keys of OLMo 2, and of OLMo 3, which has layers with a sliding window."""
    refuse(config, "OLMo", ("attention_bias", "tie_word_embeddings"))
    _require_plain_heads(config, "OLMo")
    keys = common_keys(config)
    if config.get("sliding_window"):
        layers = config.get("layer_types") or [
            "sliding_attention" if layer % 4 else "full_attention"
            for layer in range(1, config["num_hidden_layers"] + 1)
        ]
        keys["sliding_window"] = config["sliding_window"]
        keys["sliding_window_pattern"] = [layer == "sliding_attention" for layer in layers]
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise GattError(
                "A scaled rotary embedding in layers with a sliding window found; llama.cpp scales "
                "only that of the others."
            )
        keys["rope_freq_base_swa"] = local.get("rope_theta", keys["rope_freq_base"])
    return keys


def granite_keys(config: JsonObject) -> Keys:
    _require_plain_heads(config, "Granite")
    plain = {key: value for key, value in config.items() if key != "head_dim"}
    scales = {
        "attention_scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    return llama_keys(plain) | {name: config[key] for name, key in scales.items()}


def ministral3_keys(config: JsonObject) -> Keys:
    rope = rope_of(config)
    if rope["rope_type"] != "yarn":
        raise GattError(
            f"A Ministral 3 with {rope['rope_type']!r} scaling of the rotary embedding found; "
            "llama.cpp expects 'yarn'."
        )
    if config.get("sliding_window"):
        raise GattError("A Ministral 3 with sliding_window found; llama.cpp has none for it.")
    return {
        **llama_keys(config),
        "rope_scaling_yarn_log_mul": rope["mscale_all_dim"],
        "attn_temperature_scale": rope["llama_4_scaling_beta"],
    }


def refuse(config: JsonObject, family: str, switches: tuple[str, ...]) -> None:
    """Refuse what llama.cpp's graph of a family does not compute."""
    for key in switches:
        if config.get(key):
            raise GattError(f"A {family} with {key} = true found; llama.cpp has none for it.")


def _require_plain_heads(config: JsonObject, family: str) -> None:
    """Check that the heads share the width of the model, as llama.cpp computes it for a family."""
    expected = config["hidden_size"] // config["num_attention_heads"]
    if head_size(config) != expected:
        raise GattError(
            f"A {family} with head_dim = {config['head_dim']} found; llama.cpp expects "
            f"hidden_size / num_attention_heads = {expected}."
        )
