"""The hyperparameters of families whose layers are of several kinds: LFM2, Qwen3.5, Gemma 4.

Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject, LinearHeads
from pipeline.gguf.huggingface.hyperparameters import Keys, common_keys, head_size, refuse, rope_of

_INTERVAL = 4
"""Of so many layers of Qwen3.5 one has full attention, unless `layer_types` says otherwise."""
_MROPE_SECTIONS = [11, 11, 10]
"""Of the rotary embedding, for time, height and width; they are equal for text."""
_SHARED = "shared"
"""The kind of Gemma 4's layers that take the keys and values of an earlier one."""


def lfm2_settings(config: JsonObject) -> JsonObject:
    """Return LFM2's configuration with the names that other families have.

    The width of its feed-forward network is that of the weights, as transformers computes it.
    """
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config["block_auto_adjust_ff_dim"]:
        factor = config["block_ffn_dim_multiplier"]
        width = int(float(1 if factor is None else factor) * int(2 * width / 3))
        multiple = config["block_multiple_of"]
        width = multiple * ((width + multiple - 1) // multiple)
    layers = range(config["num_hidden_layers"])
    listed = config.get("full_attn_idxs")
    attention = layers if listed is None else listed
    plain = {key: value for key, value in config.items() if key != "block_ff_dim"}
    return plain | {
        "intermediate_size": width,
        "block_auto_adjust_ff_dim": False,
        "rms_norm_eps": config["norm_eps"],
        "tie_word_embeddings": config.get("tie_embedding", config["tie_word_embeddings"]),
        "layer_types": config.get("layer_types")
        or ["full_attention" if n in attention else "conv" for n in layers],
        **_rope_with_default(config, 1_000_000.0),
    }


def lfm2_keys(config: JsonObject) -> Keys:
    refuse(config, "LFM2", ("conv_bias",))
    heads = config["num_key_value_heads"]
    return common_keys(config) | {
        "head_count_kv": [0 if kind == "conv" else heads for kind in config["layer_types"]],
        "vocab_size": config["vocab_size"],
        "shortconv_l_cache": config["conv_L_cache"],
    }


def qwen35_settings(config: JsonObject) -> JsonObject:
    """Return Qwen3.5's configuration with the kind of every layer."""
    interval = config.get("full_attention_interval", _INTERVAL)
    kinds = ["linear_attention" if n % interval else "full_attention" for n in _numbers(config)]
    rope = _rope_with_default(config, 10_000.0)
    return {**config, "layer_types": config.get("layer_types") or kinds, **rope}


def qwen35_keys(config: JsonObject) -> Keys:
    refuse(config, "Qwen3.5", ("attention_bias",))
    rope, heads = rope_of(config), linear_heads(config)
    assert heads
    sections = [*rope.get("mrope_section", _MROPE_SECTIONS), 0, 0, 0, 0][:4]
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    return common_keys(config) | {
        "ssm_conv_kernel": config["linear_conv_kernel_dim"],
        "ssm_state_size": heads.key_size,
        "ssm_group_count": heads.keys,
        "ssm_time_step_rank": heads.values,
        "ssm_inner_size": heads.value_size * heads.values,
        "attention.recurrent_layers": recurrent,  # `gguf` 0.19 has no method for it
        "full_attention_interval": config.get("full_attention_interval", _INTERVAL),
        "rope_dimension_count": int(head_size(config) * rope.get("partial_rotary_factor", 0.25)),
        "rope_dimension_sections": sections,
    }


def linear_heads(config: JsonObject) -> LinearHeads | None:
    """Return the heads of linear attention; None for a model without."""
    if "linear_num_key_heads" not in config:
        return None
    return LinearHeads(
        config["linear_num_key_heads"],
        config["linear_num_value_heads"],
        config["linear_key_head_dim"],
        config["linear_value_head_dim"],
    )


def gemma4_keys(config: JsonObject) -> Keys:
    refuse(config, "Gemma 4", ("attention_bias",))
    if config.get("enable_moe_block") or config.get("use_bidirectional_attention") == "all":
        raise GattError(
            "A Gemma 4 with enable_moe_block or use_bidirectional_attention = 'all' found, which "
            "this version cannot write. Take a dense chat model."
        )
    if not config.get("final_logit_softcapping"):
        raise GattError("A Gemma 4 without final_logit_softcapping found; llama.cpp applies 30.")
    rope, local = rope_of(config), _local_rope(config)
    if rope["rope_type"] != "proportional" or local.get("rope_type", "default") != "default":
        raise GattError(
            f"A Gemma 4 with {rope['rope_type']!r} scaling of the rotary embedding found; "
            "llama.cpp expects 'proportional', and none in layers with a sliding window."
        )
    kinds, size = config["layer_types"], global_head_size(config)
    shared, width = config["num_kv_shared_layers"], config["intermediate_size"]
    own = config["num_hidden_layers"] - shared
    if shared and kinds[:own][-2:] != ["sliding_attention", "full_attention"]:
        raise GattError(
            f"A Gemma 4 whose layers share the keys and values of {kinds[:own][-2:]} found; "
            "llama.cpp takes them of a layer with a sliding window and of one without, in this "
            "order."
        )
    keys = common_keys({**config, "rope_parameters": {**rope, "rope_type": "default"}}) | {
        "rope_freq_base_swa": local.get("rope_theta", 10_000.0),
        "final_logit_softcapping": config["final_logit_softcapping"],
        "sliding_window": config["sliding_window"],
        "sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
        "shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
        "key_length": size,
        "value_length": size,
        "key_length_swa": config["head_dim"],
        "value_length_swa": config["head_dim"],
        "rope_dimension_count": size,
        "rope_dimension_count_swa": config["head_dim"],
    }
    if config["use_double_wide_mlp"]:
        keys["feed_forward_length"] = [
            width * (1 + (n >= own)) for n in range(config["num_hidden_layers"])
        ]
    if (full := of_full_attention(config, "num_key_value_heads")) is not None:
        keys["head_count_kv"] = [
            config["num_key_value_heads"] if kind == "sliding_attention" else full for kind in kinds
        ]
    return keys


def gemma4_settings(config: JsonObject) -> JsonObject:
    """Return Gemma 4's configuration with the kind of every layer; the last one sees everything."""
    kinds = ["sliding_attention" if n % 6 else "full_attention" for n in _numbers(config)]
    kinds = [*(config.get("layer_types") or kinds)[:-1], "full_attention"]
    return {**config, "layer_types": kinds}


def gemma4_kinds(config: JsonObject) -> list[str]:
    """Return which weights the layers have: those that share keys and values may have none."""
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return [kind if n < own else _SHARED for n, kind in enumerate(config["layer_types"])]


def global_head_size(config: JsonObject) -> int:
    """Return the width of a head of Gemma 4's layers with full attention."""
    size = config.get("global_head_dim") or of_full_attention(config, "head_dim")
    return int(size or 512)


def of_full_attention(config: JsonObject, key: str) -> int | None:
    """Return a setting that Gemma 4's layers with full attention have of their own."""
    if key == "num_key_value_heads" and config.get("num_global_key_value_heads") is not None:
        return int(config["num_global_key_value_heads"]) if config["attention_k_eq_v"] else None
    layers: JsonObject = config.get("per_layer_config") or {}
    for number, kind in enumerate(config["layer_types"]):
        settings = layers.get(str(number), {})
        if kind == "full_attention" and key in settings:
            return int(settings[key])
    return None


def _local_rope(config: JsonObject) -> JsonObject:
    """Return the rotary settings of layers with a sliding window."""
    return dict((config.get("rope_parameters") or {}).get("sliding_attention") or {})


def _rope_with_default(config: JsonObject, theta: float) -> JsonObject:
    """Return the rotary settings where a configuration has none."""
    named = config.get("rope_parameters") or config.get("rope_scaling") or config.get("rope_theta")
    return {} if named else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _numbers(config: JsonObject) -> range:
    """Return the layers' numbers from 1 on."""
    return range(1, config["num_hidden_layers"] + 1)
