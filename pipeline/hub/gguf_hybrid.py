"""The settings of families whose layers are of several kinds, as a GGUF tells them: LFM2, Qwen3.5,
Gemma 4.
"""

from __future__ import annotations

from typing import Any

from pipeline.gguf import ggml
from pipeline.gguf.base import JsonObject
from pipeline.gguf.gguf_base import layer_kinds, linear_heads
from pipeline.gguf.reader import GgufInfo

HYBRID = ("lfm2", "qwen35", "gemma4")
"""Architectures whose layers are of several kinds."""


def hybrid_settings(info: GgufInfo, config: JsonObject) -> JsonObject:
    """Return what only the family of the model has in its `config.json`, besides `config`."""
    if info.architecture == "lfm2":
        return {
            "layer_types": layer_kinds(info),
            "norm_eps": config["rms_norm_eps"],
            "conv_L_cache": info.hyperparameter("shortconv.l_cache"),
            "block_auto_adjust_ff_dim": False,
        }
    return _qwen35_settings(info, config) if info.architecture == "qwen35" else _gemma4(info)


def _qwen35_settings(info: GgufInfo, config: JsonObject) -> JsonObject:
    get, kinds, heads = info.hyperparameter, layer_kinds(info), linear_heads(info)
    assert heads
    rope = {
        **config["rope_parameters"],
        "partial_rotary_factor": get("rope.dimension_count") / config["head_dim"],
        "mrope_section": get("rope.dimension_sections")[:3],
        "mrope_interleaved": True,
    }
    return {
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "linear_num_key_heads": heads.keys,
        "linear_num_value_heads": heads.values,
        "linear_key_head_dim": heads.key_size,
        "linear_value_head_dim": heads.value_size,
        "rope_parameters": rope,
    }


def _gemma4(info: GgufInfo) -> JsonObject:
    get, tensors = info.hyperparameter, {tensor.name: tensor for tensor in info.tensors}
    kinds = [
        "sliding_attention" if slides else "full_attention"
        for slides in get("attention.sliding_window_pattern")
    ]
    own = [n for n in range(info.layers) if f"blk.{n}.attn_k.weight" in tensors]
    full = [n for n in own if kinds[n] == "full_attention"]
    widths = _each(get("feed_forward_length"), info.layers)
    heads = _each(get("attention.head_count_kv"), info.layers)
    factors = tensors["rope_freqs.weight"]
    values = ggml.dequantize(factors.data, factors.kind, factors.shape[-1]).reshape(-1)
    per_layer = tensors.get("per_layer_token_embd.weight")
    shared_values = any(f"blk.{n}.attn_v.weight" not in tensors for n in full)
    return {
        "layer_types": kinds,
        "head_dim": get("attention.key_length_swa"),
        "global_head_dim": get("attention.key_length"),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "num_key_value_heads": heads[kinds.index("sliding_attention")],
        "num_global_key_value_heads": heads[kinds.index("full_attention")],
        "attention_k_eq_v": shared_values,
        "num_kv_shared_layers": get("attention.shared_kv_layers", 0),
        "sliding_window": get("attention.sliding_window"),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 0),
        **({"vocab_size_per_layer_input": per_layer.shape[0]} if per_layer else {}),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": get("rope.freq_base"),
                "partial_rotary_factor": float((values == 1).mean()),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": get("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _each(value: Any, layers: int) -> list[int]:
    """Return a setting of every layer; a file may have one for all."""
    return list(value) if isinstance(value, list) else [value] * layers
