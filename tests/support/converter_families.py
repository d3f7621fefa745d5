"""Random miniatures of the families that only llama.cpp's own converter writes."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.export.verify import load_and_predict
from pipeline.gguf.base import JsonObject
from pipeline.hub import llama_converter
from pipeline.inference.logits import mean_kl
from support.bases import edit_json
from support.converter_mixtures import (
    DENSE_FIRST,
    GLM_TOKENS,
    GRANITE_SHARED,
    MIXTURES,
    MLA,
    MOE,
    SHARED_EXPERT,
    SPARSE_SECOND,
    Miniature,
)
from support.families import SIZES
from support.family_tokenizers import save_byte_level, save_gemma4, save_sentencepiece

if TYPE_CHECKING:
    import pytest
    from transformers import PreTrainedConfig, PreTrainedModel

_GPT2: JsonObject = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MAMBA: JsonObject = {"state_size": 16, "time_step_rank": 4, "intermediate_size": 128}
_MAMBA_HEADS: JsonObject = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
}
_NEMOTRON: JsonObject = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
}
_QWEN_LINEAR: JsonObject = {
    **SHARED_EXPERT,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

_DENSE = {
    "Apertus": Miniature(),
    "Arcee": Miniature("llama-bpe"),
    "BitNet": Miniature("sentencepiece", {"tie_word_embeddings": True}),
    "Bloom": Miniature(settings={"n_layer": 2, "n_head": 4}),
    "Cohere": Miniature(),
    "Cohere2": Miniature(settings={"sliding_window": 64, "rotary_pct": 1.0}),
    "Ernie4_5": Miniature("sentencepiece", {"head_dim": 16}),
    "Exaone4": Miniature(settings={"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "Falcon": Miniature(settings={"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Gemma": Miniature("sentencepiece", {"head_dim": 16}),
    "Gemma3n": Miniature(
        "sentencepiece",
        {
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "num_kv_shared_layers": 0,
            # llama.cpp knows these by heart.
            "activation_sparsity_pattern": [0.95, 0.95],
            "hidden_size_per_layer_input": 256,
            "laurel_rank": 64,
        },
    ),
    "Glm": Miniature(settings={"head_dim": 16}, tokens=GLM_TOKENS),
    "Glm4": Miniature(settings={"head_dim": 16}, tokens=GLM_TOKENS),
    "GPT2": Miniature(settings=_GPT2, keys={"n_ctx": 256}),
    "GPTBigCode": Miniature(settings=_GPT2),
    "GPTNeoX": Miniature(keys={"rotary_pct": 0.25}),
    "GraniteSWA": Miniature("refact", {"sliding_window": 64}),
    "HrmText": Miniature(
        settings={
            "head_dim": 16,
            "num_key_value_heads": 4,
            "num_hidden_layers": 1,
            "H_cycles": 2,
            "L_cycles": 2,
        }
    ),
    "HunYuanDenseV1": Miniature(settings={"head_dim": 16}),
    "Jais2": Miniature(settings={"head_dim": 16}),
    "MiniCPM3": Miniature("sentencepiece", MLA),
    "Nemotron": Miniature("sentencepiece"),
    "Olmo": Miniature(),
    "Phi": Miniature(settings={"num_key_value_heads": 4, "intermediate_size": 256}),
    "SeedOss": Miniature(settings={"head_dim": 16}),
    "StableLm": Miniature(),
    "Starcoder2": Miniature(),
    "Youtu": Miniature(settings=MLA),
}
_WITH_A_STATE = {
    "Bamba": Miniature(
        "llama-bpe",
        {**_MAMBA_HEADS, "attn_layer_indices": [1]},
        keys={"attn_rotary_emb": 8},
    ),
    "FalconH1": Miniature(
        settings={
            **_MAMBA_HEADS,
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
        }
    ),
    "FalconMamba": Miniature(settings=_MAMBA),
    "GraniteMoeHybrid": Miniature(
        "refact",
        {
            **_MAMBA_HEADS,
            **GRANITE_SHARED,
            "layer_types": ["mamba", "attention"],
        },
        keys={"layer_types": ["mamba", "attention"]},
    ),
    "Jamba": Miniature(
        "sentencepiece",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "KimiLinear": Miniature(
        settings={
            **MOE,
            **SPARSE_SECOND,
            **MLA,
            "q_lora_rank": None,
            "num_local_experts": 4,
            "n_shared_experts": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        keys={
            **DENSE_FIRST,
            "moe_router_activation_func": "sigmoid",
            "linear_attn_config": {
                "kda_layers": [1],
                "full_attn_layers": [2],
                "head_dim": 16,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
        renamed=((r"layers\.0\.block_sparse_moe", "layers.0.mlp"),),
    ),
    "Mamba": Miniature(settings=_MAMBA),
    "Mamba2": Miniature(
        settings={
            **_MAMBA,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 32,
        }
    ),
    "NemotronH": Miniature(
        settings={
            **MOE,
            **_NEMOTRON,
            "layers_block_type": ["mamba", "attention", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 48,
        }
    ),
    "NemotronH dense": Miniature(
        settings={**_NEMOTRON, "layers_block_type": ["mamba", "attention", "mlp"]},
        keys={
            "hybrid_override_pattern": "M*-",
            "layers_block_type": None,
            "num_hidden_layers": 3,
            **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")),
        },
    ),
    "Qwen3_5Moe": Miniature("qwen2", _QWEN_LINEAR),
    "Qwen3Next": Miniature("qwen2", _QWEN_LINEAR),
    "Qwen4Exp": Miniature(
        "qwen2",
        {
            **_QWEN_LINEAR,
            "output_gate_type": "sigmoid",
            "hc_count": 2,
            "hc_lowrank": 16,
            "ple_layer_ids": [1],
            "ple_embed_dim": 64,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 2,
            "indexer_n_heads": 8,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 32,
            "indexer_budget": 64,  # llama.cpp takes up to three tokens more
            "indexer_compress_ratio": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
        },
        keys={"layer_types": _QWEN_LINEAR["layer_types"]},
    ),
}
MINIATURES = {**_DENSE, **MIXTURES, **_WITH_A_STATE}
"""By transformers' name of the class; a second word tells several of a class apart."""


class Problem(NamedTuple):
    """Why a family does not pass, by whose fault, and what is seen: a part of the error's message,
    or how far llama.cpp is from transformers in nats a token.
    """

    reason: str
    message: str = ""
    nats: float = 0.0


PROBLEMS = {
    "Bamba": Problem(
        "upstream: LlamaModel.permute of the converter pairs the rows of a whole head, of which "
        "half are rotated (1e-6 nats if it pairs those of the half)",
        nats=0.12,
    ),
    "BitNet": Problem(
        "upstream: the converter knows other names of its norms (ffn_sub_norm, attn_sub_norm)",
        "Can not map tensor",
    ),
    "DeepseekV32": Problem(
        "upstream: the converter wants a tokenizer with add_bos_token, which transformers 5 drops "
        "where there is a tokenizer.json (2e-6 nats without the question)",
        "Change value of add_bos_token",
    ),
    "DeepseekV4": Problem(
        "upstream: _write_mxfp4_expert_tensor of the converter reads experts in MXFP4 alone",
        "Missing routed expert tensors",
    ),
    "GptOss": Problem(
        "upstream: llama.cpp rounds the ends of YaRN's correction, which the family does not "
        "(5e-6 nats if transformers does, too: truncate = true)",
        nats=0.01,
    ),
    "HYV4": Problem(
        "upstream: llama.cpp rotates neighbors (LLAMA_ROPE_TYPE_NORM), transformers halves "
        "(2e-6 nats if the rows of the checkpoint are reordered)",
        nats=1.44,
    ),
    "HunYuanMoEV1": Problem(
        "upstream: the converter reads mergeable_ranks of a tokenizer in the model's own code "
        "(1e-6 nats with transformers' tokenizer)",
        "has no attribute mergeable_ranks",
    ),
    "MiMoV2Flash": Problem(
        "upstream: the converter reads a partial_rotary_factor for all layers, transformers 5 has "
        "one for each kind (2e-6 nats with that of full attention)",
        "partial_rotary_factor",
    ),
}
"""What does not pass. What the converter lacks was added for once, and passed with that."""


def class_of(name: str) -> str:
    """Return the name of the class in transformers that a miniature is of."""
    base = name.split()[0]
    return f"{base}LMHeadModel" if base == "GPT2" else f"{base}ForCausalLM"


def save_miniature(name: str, folder: Path, **changes: object) -> None:
    """Save a random model of a family in float16; `changes` are of its configuration."""
    family = MINIATURES[name]
    save_random(class_of(name), save_config(name, folder, **changes), folder)
    _rename_weights(folder / "model.safetensors", family.renamed)
    edit_json(folder / "config.json", **family.keys)


def save_config(name: str, folder: Path, **changes: object) -> PreTrainedConfig:
    """Save the tokenizer of a miniature, and return its configuration."""
    folder.mkdir(parents=True)
    vocab_size = _save_tokenizer(MINIATURES[name], folder, gemma=name.startswith("Gemma"))
    return config_of(name, vocab_size, **changes)


def config_of(name: str, vocab_size: int, **changes: object) -> PreTrainedConfig:
    """Return the configuration of a miniature."""
    import transformers

    base = name.split()[0]
    settings = {**SIZES, "vocab_size": vocab_size, **MINIATURES[name].settings, **changes}
    if base in ("Gemma3n", "Gemma4"):
        settings["vocab_size_per_layer_input"] = vocab_size
    text = getattr(transformers, f"{base}TextConfig", None)
    config: PreTrainedConfig = (text or getattr(transformers, f"{base}Config"))(**settings)
    return config


def save_random(class_name: str, config: PreTrainedConfig, folder: Path) -> None:
    """Save a random network in float16, with noise on what is constant at first, such as norms."""
    import torch
    import transformers

    torch.manual_seed(1)
    network = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.to(torch.float16).save_pretrained(folder)


def _save_tokenizer(family: Miniature, folder: Path, *, gemma: bool) -> int:
    """Save the tokenizer of a family; return the size of an embedding for it."""
    import transformers

    if family.tokenizer == "sentencepiece":
        vocab_size = save_sentencepiece(folder, "GemmaTokenizer" if gemma else "LlamaTokenizer")
    elif family.tokenizer == "gemma 4":
        return save_gemma4(folder)  # of which llama.cpp has a row for each token, and no other
    else:
        vocab_size = save_byte_level(folder, family.tokenizer)
    if family.tokens:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
        tokenizer.save_pretrained(folder)
        vocab_size = len(tokenizer) + 3
    return -(-vocab_size // 16) * 16  # some converters expect a round number


def _rename_weights(file: Path, patterns: tuple[tuple[str, str], ...]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for pattern, name in patterns:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    if patterns:
        save_file(weights, file, {"format": "pt"})


def let_converter_know(
    classes: Iterable[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Put a converter that knows these classes in the place of llama.cpp's; return its script."""
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "__init__.py").write_text(
        f"TEXT_MODEL_MAP: dict[str, str] = {dict.fromkeys(classes, 'module')}\n"
    )
    monkeypatch.setattr(llama_converter, "llama_cpp_sources", lambda: folder)
    return folder / llama_converter.SCRIPT


def nats_from(network: PreTrainedModel, file: Path) -> float:
    """Return how far a GGUF in llama.cpp is from a network, in nats a token."""
    import torch

    ids = torch.randint(5, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(ids).logits[0].numpy()
    actual = load_and_predict(file, (), [ids[0].tolist()]).logits.values
    pairs = zip(expected[:, None], actual[:, None], strict=True)
    distances = sorted(itertools.starmap(mean_kl, pairs))
    # At a token or two the choice of an expert is too close to be the same.
    text = network.config.get_text_config()
    with_experts = getattr(text, "num_experts_per_tok", 0) or getattr(text, "top_k_experts", 0)
    return statistics.fmean(distances[: -2 if with_experts else None])
