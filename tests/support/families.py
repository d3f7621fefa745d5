"""Random models of every supported family in miniature, and random adapters for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from pipeline.gguf.base import JsonObject
from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.hub.gguf_tokenizer import SAME_RULE
from support.models import TEXTS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)
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

    `tokenizer` is "sentencepiece", or llama.cpp's name of a byte-level BPE's pre-tokenizer.
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
    else:
        vocab_size = save_byte_level(folder, family.tokenizer)
    torch.manual_seed(1)
    settings = {**SIZES, "vocab_size": vocab_size, **family.settings}
    config = getattr(transformers, f"{family.config or family.model}Config")(**settings)
    network = getattr(transformers, f"{family.model}ForCausalLM")(config)
    # Norms are constant at first, which would hide what the conversion does to them.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.to(torch.bfloat16).save_pretrained(folder)


def save_byte_level(folder: Path, pre_tokenizer: str) -> int:
    """Train a byte-level BPE on `TEXTS`, save it, and return the size of an embedding for it."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ("<|endoftext|>", "<|begin|>", "<|end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in special],
    )
    bpe.train_from_iterator([" ".join(TEXTS)] * 4, trainer)
    bpe.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    rule = SAME_RULE.get(pre_tokenizer, pre_tokenizer)
    steps = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]}
    described = {**json.loads(bpe.to_str()), "pre_tokenizer": steps}
    described["model"]["ignore_merges"] = pre_tokenizer in ("llama-bpe", "tekken")
    # An ordinary token that llama.cpp takes for a control token, as Qwen2.5 has one.
    vocabulary, tool = described["model"]["vocab"], described["added_tokens"][-1]
    vocabulary["</s>"], tool["id"] = len(vocabulary), len(vocabulary) + 1
    bpe_json = json.dumps(described)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe_json),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # Phi-4-mini names its tokenizer like this.
    tokenizer_class = "GPT2Tokenizer" if pre_tokenizer == "gpt-4o" else "PreTrainedTokenizerFast"
    settings["tokenizer_class"] = tokenizer_class
    file.write_text(json.dumps(settings), encoding="utf-8")
    return len(tokenizer) + 3  # an embedding may have rows that no token has


def save_sentencepiece(folder: Path, tokenizer_class: str) -> int:
    """Train a SentencePiece model on `TEXTS`, save it, and return the size of an embedding."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(list(TEXTS) * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = int(model.vocab_size())
    added = {"<unused0>": False, "<start_of_turn>": True, "▁▁x": False}
    settings = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(size + n): {"content": text, "special": special}
            for n, (text, special) in enumerate(added.items())
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return size + len(added) + 2


def save_adapter(model_dir: Path, folder: Path) -> Path:
    """Save a random LoRA on every linear projection of a model."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    experts = "Moe" in type(network).__name__  # these are not linear layers there
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if experts else "all-linear"
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(network, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(str(folder))
    return folder
