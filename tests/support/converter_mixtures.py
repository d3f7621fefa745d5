"""Random miniatures of mixtures of experts that only llama.cpp's own converter writes."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.gguf.base import JsonObject
from support.families import FAMILIES

MOE: JsonObject = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT: JsonObject = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}
GRANITE_SHARED: JsonObject = {"num_local_experts": 4, "shared_intermediate_size": 48}
MLA: JsonObject = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DENSE_FIRST: JsonObject = {"first_k_dense_replace": 1}
SPARSE_SECOND: JsonObject = {"mlp_layer_types": ["dense", "sparse"]}
GLM_TOKENS = ("<|user|>", "<|observation|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>")
_DEEPSEEK: JsonObject = {
    **MOE,
    **MLA,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_INDEXER: JsonObject = {
    "index_topk": 64,
    "index_head_dim": 64,  # llama.cpp rotates 64 dimensions at a time
    "index_n_heads": 8,
}
_ROPE: JsonObject = {"rope_type": "default", "rope_theta": 500000.0}
_SIGMOID: JsonObject = {"scoring_func": "sigmoid"}


class Miniature(NamedTuple):
    """The tokenizer of a family (as in `support.families`), and what differs from `SIZES`.

    `keys` are what published configurations have besides, and transformers 5 does not write; those
    that are None there they do not have. `renamed` are patterns of weights that transformers 5 does
    not save under their published names.
    """

    tokenizer: str = "gpt-2"
    settings: JsonObject = {}  # noqa: RUF012  never changed
    tokens: tuple[str, ...] = ()
    keys: JsonObject = {}  # noqa: RUF012
    renamed: tuple[tuple[str, str], ...] = ()


MIXTURES = {
    "Afmoe": Miniature(
        settings={
            **MOE,
            "head_dim": 16,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": 64,
            "mup_enabled": True,  # as published; llama.cpp always scales the embeddings
        },
        keys={"score_func": "sigmoid", "route_norm": True},
    ),
    "Cohere2Moe": Miniature(settings={"head_dim": 16, "sliding_window": 64, "num_experts": 4}),
    "Dbrx": Miniature(
        settings={
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "DeepseekV2": Miniature(settings={**_DEEPSEEK, **DENSE_FIRST}),
    "DeepseekV3": Miniature(settings={**_DEEPSEEK, **DENSE_FIRST}, keys=_SIGMOID),
    "DeepseekV32": Miniature(
        settings={**_DEEPSEEK, **SPARSE_SECOND, **DENSE_FIRST, **_INDEXER},
        keys=_SIGMOID,
    ),
    "DeepseekV4": Miniature(
        settings={
            **MOE,
            **_INDEXER,
            "intermediate_size": 32,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "o_groups": 2,
            "o_lora_rank": 16,
            "hc_mult": 2,
            "sliding_window": 64,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["moe", "moe"],
        },
        keys={"qk_rope_head_dim": 16, "compress_ratios": [128, 4], "num_hash_layers": 0},
        renamed=((r"^model\.", ""),),
    ),
    "Dots1": Miniature(
        settings={
            **MOE,
            **DENSE_FIRST,
            "head_dim": 16,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
        },
        keys=_SIGMOID,
    ),
    "Ernie4_5_Moe": Miniature(
        "sentencepiece",
        {
            "moe_intermediate_size": 48,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_end_index": 1,
        },
    ),
    "ExaoneMoe": Miniature(
        settings={**MOE, **SPARSE_SECOND, "num_experts": 4, "sliding_window": 64},
        keys=_SIGMOID,
    ),
    "Gemma4 moe": Miniature(
        "gemma 4",
        {
            **FAMILIES["gemma 4 dense"].settings,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "Glm4Moe": Miniature(
        settings={**MOE, "head_dim": 16, "n_routed_experts": 4, "first_k_dense_replace": 1},
        tokens=GLM_TOKENS,
    ),
    "Glm4MoeLite": Miniature(
        settings={**_DEEPSEEK, **SPARSE_SECOND},
        tokens=GLM_TOKENS,
        keys={**DENSE_FIRST, **_SIGMOID},
    ),
    "GlmMoeDsa": Miniature(
        settings={**_DEEPSEEK, **SPARSE_SECOND, **DENSE_FIRST, **_INDEXER},
        tokens=GLM_TOKENS,
    ),
    "GptOss": Miniature(
        "gpt-4o",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    ),
    "GraniteMoe": Miniature("smollm", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoeShared": Miniature("refact", GRANITE_SHARED),
    "GraniteMoeSWA": Miniature("refact", {**GRANITE_SHARED, "sliding_window": 64}),
    "HunYuanMoEV1": Miniature(
        settings={"head_dim": 16, "num_experts": 4, "moe_topk": [2, 2]},
        keys={"moe_intermediate_size": [96, 96], "num_shared_expert": [1, 1]},
    ),
    "HYV3": Miniature(
        settings={
            **MOE,
            **SPARSE_SECOND,
            "head_dim": 16,
            "num_experts": 4,
            "num_shared_experts": 1,
        }
    ),
    "HYV4": Miniature(
        settings={
            **_DEEPSEEK,
            **SPARSE_SECOND,
            **_INDEXER,
            "indexer_types": ["full", "shared"],
            "hc_mult": 2,
        },
        renamed=(
            (r"\.hc_pre\.(hc_\w+_layer)", r".\1.hc_pre"),
            (r"\.hc_pre\.hc_head", ".hc_head"),
            (r"(\.mlp.*)\.linear_gate", r"\1.gate_proj"),
        ),
    ),
    "Laguna": Miniature(
        settings={
            **SHARED_EXPERT,
            **SPARSE_SECOND,
            "head_dim": 16,
            "num_attention_heads_per_layer": [4, 4],
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 64,
        }
    ),
    "Lfm2Moe": Miniature(
        "llama-bpe",
        {
            **MOE,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
        },
    ),
    "Llama4": Miniature(
        "gpt-4o",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 96,
            "num_hidden_layers": 4,  # the fourth has no rotary embedding
        },
    ),
    "Mellum": Miniature(
        settings={
            **MOE,
            "head_dim": 16,
            "num_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            # llama.cpp has one for both.
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        }
    ),
    "MiMoV2Flash": Miniature(
        settings={
            **MOE,
            **SPARSE_SECOND,
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 64,
        },
        keys={
            **_SIGMOID,
            "rope_parameters": None,
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.334,
            "layernorm_epsilon": 1e-5,
            "topk_method": "noaux_tc",
            "hybrid_layer_pattern": [0, 1],
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
        },
    ),
    "MiniMaxM2": Miniature(
        settings={"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        keys={**_SIGMOID, "rotary_dim": 16},
    ),
    "Mixtral": Miniature("llama-bpe", {"num_local_experts": 4}),
    "Olmoe": Miniature(
        settings={"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    ),
    "Qwen2Moe": Miniature("qwen2", SHARED_EXPERT),
    "SolarOpen": Miniature(
        settings={**MOE, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1},
        tokens=("<unk>", "<|startoftext|>"),
    ),
}
"""By transformers' name of the class."""
