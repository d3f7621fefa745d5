"""Random models of every supported family in miniature, and random adapters for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from pipeline.gguf.base import JsonObject
from support.family_tokenizers import save_byte_level, save_gemma4, save_sentencepiece

SIZES: JsonObject = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5 + n for n in range(8)],
    "short_factor": [1.0 + n / 9 for n in range(8)],
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MINISTRAL_ROPE = {
    **_YARN_ROPE,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_GEMMA = {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
_MOE = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


class Family(NamedTuple):
    """A family's class names in transformers, its tokenizer, and what differs from `SIZES`.

    `tokenizer` is "sentencepiece", "gemma 4" (BPE with byte fallback and merges), or llama.cpp's
    name of a byte-level BPE's pre-tokenizer.
    """

    model: str
    tokenizer: str
    settings: JsonObject
    config: str = ""


FAMILIES = {
    "llama 3": Family(
        "Llama", "llama-bpe", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False}
    ),
    "llama 2": Family("Llama", "sentencepiece", {"num_key_value_heads": 4}),
    "smollm2": Family("Llama", "smollm", {"tie_word_embeddings": True}),
    "mistral": Family("Mistral", "sentencepiece", {"head_dim": 16, "sliding_window": None}),
    "qwen2": Family(
        "Qwen2", "qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    "qwen2 yarn": Family("Qwen2", "qwen2", {"rope_parameters": _YARN_ROPE}),
    "qwen3": Family("Qwen3", "qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 moe": Family("Qwen3Moe", "qwen2", _MOE),
    "gemma 2": Family("Gemma2", "sentencepiece", _GEMMA),
    "gemma 3": Family("Gemma3", "sentencepiece", _GEMMA, config="Gemma3Text"),
    # llama.cpp's Phi-3 ignores the sliding window: it must hold the whole context.
    "phi 3": Family("Phi3", "sentencepiece", {"sliding_window": 256}),
    "phi 4 mini": Family(
        "Phi3", "gpt-4o", {"rope_parameters": _LONG_ROPE, "tie_word_embeddings": True}
    ),
    "smollm3": Family("SmolLM3", "llama-bpe", {"num_hidden_layers": 5}),
    "olmo 2": Family("Olmo2", "dbrx", {}),
    "olmo 3": Family(
        "Olmo3",
        "dbrx",
        {
            "num_hidden_layers": 4,
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": {**_YARN_ROPE, "attention_factor": 0.1 * math.log(4) + 1},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        },
    ),
    "granite": Family(
        "Granite",
        "refact",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "ministral 3": Family(
        "Ministral3", "tekken", {"head_dim": 32, "rope_parameters": _MINISTRAL_ROPE}
    ),
    "lfm2": Family(
        "Lfm2",
        "lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_multiple_of": 32,
        },
    ),
    "qwen3.5": Family(
        "Qwen3_5",
        "qwen35",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "mtp_num_hidden_layers": 1,
        },
        config="Qwen3_5Text",
    ),
    "gemma 4": Family(
        "Gemma4",
        "gemma 4",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 64,
            "final_logit_softcapping": 30.0,
        },
        config="Gemma4Text",
    ),
    "gemma 4 dense": Family(
        "Gemma4",
        "gemma 4",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 64,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 30.0,
        },
        config="Gemma4Text",
    ),
}


def save_family(name: str, folder: Path) -> None:
    """Save a random model of a family in bfloat16."""
    import torch
    import transformers

    family = FAMILIES[name]
    folder.mkdir(parents=True)
    if family.tokenizer == "sentencepiece":
        tokenizer_class = "GemmaTokenizer" if "gemma" in name else "LlamaTokenizer"
        vocab_size = save_sentencepiece(folder, tokenizer_class)
    elif family.tokenizer == "gemma 4":
        vocab_size = save_gemma4(folder)
    else:
        vocab_size = save_byte_level(folder, family.tokenizer)
    torch.manual_seed(1)
    settings = {**SIZES, "vocab_size": vocab_size, **family.settings}
    if family.tokenizer == "gemma 4":
        settings["vocab_size_per_layer_input"] = vocab_size
    config = getattr(transformers, f"{family.config or family.model}Config")(**settings)
    network = getattr(transformers, f"{family.model}ForCausalLM")(config)
    # Norms are constant at first, which would hide what the conversion does to them.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for buffer_name, buffer in network.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.mul_(0.75)
    network.to(torch.bfloat16).save_pretrained(folder)


def save_adapter(model_dir: Path, folder: Path) -> Path:
    """Save a random LoRA on every linear projection of a model."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    experts = "Moe" in type(network).__name__  # these are not linear layers there
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear"
    # llama.cpp applies no adapter to this one of Gemma 4.
    left_out = ["per_layer_model_projection"] if "Gemma4" in type(network).__name__ else None
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, exclude_modules=left_out)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(network, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(str(folder))
    return folder
