"""A GGUF as a folder that transformers and Unsloth load: configuration, weights, tokenizer.

transformers can read a GGUF itself, but leaves out what the file says about head sizes, scaled
rotary embeddings and sliding windows: it fails for Qwen3, and computes something else for Llama
3.1, Gemma and Phi-4-mini.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, JsonObject
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.gguf_base import GgufBase
from pipeline.gguf.huggingface.rope_factors import llama3_factors
from pipeline.gguf.reader import GgufInfo, StoredTensor
from pipeline.hub.gguf_hybrid import HYBRID, hybrid_settings
from pipeline.hub.gguf_tokenizer import save_gguf_tokenizer
from pipeline.hub.gguf_weights import gguf_weights
from pipeline.hub.text_checkpoint import write_safetensors

_LARGE_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layers of Gemma's 27B models, whose attention llama.cpp scales by another width."""


def write_gguf_checkpoint(base: GgufBase, info: GgufInfo, target: Path) -> None:
    """Write a GGUF to the folder `target`, its weights dequantized to bfloat16.

    Raises:
        GattError: a rotary embedding that transformers has no name for.
    """
    target.mkdir(parents=True)
    config = model_config(info)
    write_safetensors(gguf_weights(base, info), target / "model.safetensors")
    save_gguf_tokenizer(info, target)
    # Without its version, transformers takes a large vocabulary for one of Mistral's early files,
    # and warns of wrong tokens.
    versioned = {**config, "transformers_version": version("transformers")}
    write_json(target / "config.json", versioned)


def model_config(info: GgufInfo) -> JsonObject:
    """Return the `config.json` of a GGUF's model.

    Raises:
        GattError: a rotary embedding that transformers has no name for.
    """
    shapes = {tensor.name: tensor.shape for tensor in info.tensors}
    names = [name for name, f in FAMILIES.items() if f.architecture == info.architecture]
    heads, hidden = info.hyperparameter("attention.head_count"), shapes["token_embd.weight"][1]
    head_dim = info.hyperparameter("attention.key_length", hidden // heads)
    key_heads = info.hyperparameter("attention.head_count_kv", heads)
    config = {
        "architectures": names[:1],
        "model_type": FAMILIES[names[0]].text_model,
        "dtype": "bfloat16",
        "num_hidden_layers": info.layers,
        "hidden_size": hidden,
        "intermediate_size": info.hyperparameter("feed_forward_length", hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": max(key_heads) if isinstance(key_heads, list) else key_heads,
        "head_dim": head_dim,
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": info.context_length,
        "rms_norm_eps": info.hyperparameter("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "rope_parameters": {} if info.architecture == "gemma4" else _rope(info, head_dim),
        "bos_token_id": info.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": info.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": info.field("tokenizer.ggml.padding_token_id"),
    }
    return config | _family_settings(info, config)


def _family_settings(info: GgufInfo, config: JsonObject) -> JsonObject:
    """Return what only the family of the model has in its configuration."""
    architecture, get = info.architecture, info.hyperparameter
    if architecture in HYBRID:
        return hybrid_settings(info, config)
    if architecture in _LARGE_LAYERS:
        large = info.layers == _LARGE_LAYERS[architecture]
        width = config["hidden_size"] // config["num_attention_heads"]
        settings = {
            "sliding_window": get("attention.sliding_window", config["max_position_embeddings"]),
            "query_pre_attn_scalar": width if large else config["head_dim"],
            "final_logit_softcapping": get("final_logit_softcapping"),
        }
        if architecture == "gemma3":
            local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
            rope = {"full_attention": config["rope_parameters"], "sliding_attention": local}
            return {**settings, "rope_parameters": rope}
        # llama.cpp's defaults
        return {
            **settings,
            "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": get("final_logit_softcapping", 30.0),
        }
    if architecture == "phi3":
        rotated = get("rope.dimension_count", config["head_dim"]) / config["head_dim"]
        rope = {**config["rope_parameters"], "partial_rotary_factor": rotated}
        return {
            "sliding_window": get("attention.sliding_window") or None,
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "rope_parameters": rope,
        }
    if architecture == "qwen3moe":
        return {
            "num_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "moe_intermediate_size": get("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
    if architecture == "olmo2" and get("attention.sliding_window"):
        return _olmo3_settings(info, config)
    if architecture == "granite":
        return {
            "attention_multiplier": get("attention.scale", config["head_dim"] ** -0.5),
            "embedding_multiplier": get("embedding_scale", 1.0),
            "residual_multiplier": get("residual_scale", 1.0),
            "logits_scaling": get("logit_scale"),
        }
    if architecture == "mistral3" and not get("attention.temperature_scale"):
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if architecture == "mistral3":
        log_mul = get("rope.scaling.yarn_log_multiplier")
        rope = {
            **config["rope_parameters"],
            "mscale": log_mul,
            "mscale_all_dim": log_mul,
            "llama_4_scaling_beta": get("attention.temperature_scale"),
        }
        return {"rope_parameters": rope, "sliding_window": None}
    return {}


def _olmo3_settings(info: GgufInfo, config: JsonObject) -> JsonObject:
    """Return what OLMo 3 has besides the settings of OLMo 2, whose architecture it is stored as."""
    get, rope = info.hyperparameter, config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", rope["rope_theta"])}
    pattern = get("attention.sliding_window_pattern", 4)
    if isinstance(pattern, int):  # every so many layers one sees the whole context
        pattern = [bool((n + 1) % pattern) for n in range(info.layers)]
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "sliding_window": get("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    }


def _rope(info: GgufInfo, head_dim: int) -> JsonObject:
    """Return the rotary settings of full attention."""
    get, tensors = info.hyperparameter, {tensor.name: tensor for tensor in info.tensors}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    original, kind = get("rope.scaling.original_context_length"), get("rope.scaling.type", "none")
    if factors := tensors.get("rope_freqs.weight"):
        return rope | _llama3_scaling(info, rope["rope_theta"], head_dim, _values(factors))
    if "rope_factors_long.weight" in tensors:
        by_length = {
            f"{name}_factor": _values(tensors[f"rope_factors_{name}.weight"]).tolist()
            for name in ("long", "short")
        }
        return (
            rope
            | {"rope_type": "longrope", "original_max_position_embeddings": original}
            | (by_length)
        )
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        names = {
            "factor": "factor",
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        values = {key: get(f"rope.scaling.{name}") for key, name in names.items()}
        return rope | {"rope_type": "yarn"} | {k: v for k, v in values.items() if v is not None}
    if kind != "none":
        raise GattError(
            f"{info.path}: a rotary embedding with {kind!r} scaling found; 'linear' or 'yarn' "
            "expected. Take the model's Hugging Face folder."
        )
    return rope


def _llama3_scaling(info: GgufInfo, theta: float, head_dim: int, factors: Array) -> JsonObject:
    """Return the settings of Llama 3's scaling that lead to a file's frequency factors.

    Its models differ in the factor, which the lowest frequency shows, and in the first context.
    """
    settings: JsonObject = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for exponent in range(13, 25):
        for context in (8192, 1 << exponent, 1 << (26 - exponent)):
            settings["original_max_position_embeddings"] = context
            computed = llama3_factors({**settings, "rope_theta": theta}, head_dim)
            if computed.shape == factors.shape and np.allclose(computed, factors, rtol=1e-4):
                return settings
    raise GattError(
        f"{info.path}: its frequency factors (rope_freqs) are not those of Llama 3, and "
        "transformers has no setting for others. Take the model's Hugging Face folder."
    )


def _values(tensor: StoredTensor) -> Array:
    return ggml.dequantize(tensor.data, tensor.kind, tensor.shape[-1]).reshape(-1)
