"""Random models in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

TEXTS = (
    "It's 2,026 and I'll pay €35.50!",
    "naïve  café\n\n\tтест 漢字 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x" * 40 + "  y ",
)
"""Texts that tokenizers often disagree on."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tiny_llama(folder: Path, *, layers: int = 2, context: int = 256) -> Path:
    """Save a Llama 3: scaled rotary embedding, grouped heads, untied output, sharded."""
    import torch
    import transformers

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def save_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE on `TEXTS`, with the pre-tokenizer of Llama 3."""
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from pipeline.gguf.vocabulary import PRE_TOKENIZERS

    bpe = Tokenizer(models.BPE())
    pattern = Regex(PRE_TOKENIZERS["llama-bpe"][0]["pattern"]["Regex"])
    bpe.pre_tokenizer = Sequence(
        [Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join(TEXTS)] * 4, trainer)
    bpe.add_special_tokens(
        [AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny_adapter(model_dir: Path, folder: Path) -> Path:
    """Save a random LoRA for the model in `model_dir`."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(str(folder))
    return folder
