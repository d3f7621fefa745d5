"""Shared by the tests: the embedded model, a tiny recipe, and the real command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "dialogues.train=4",
    "dialogues.turns=2",
    "train.max_steps=2",
    "train.rank=4",
    "train.save_steps=1",
    "synthesize.max_tokens=40",
    "evaluate.dialogues=3",
    "evaluate.turns=3",
    "evaluate.max_tokens=24",
    "evaluate.attention=false",
    "evaluate.suite_dialogues=1",
    "dialogues.validation=1",
)

TEXTS = (
    "It's 2,026 and I'll pay €35.50!",
    "naïve  café\n\n\tтест 漢字 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x" * 40 + "  y ",
)
"""What tokenizers are apt to disagree on."""

Gatt = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def gatt() -> Gatt:
    """Run `python -m pipeline` with the given words."""

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            **options,
        )  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The overrides of a run of a minute."""
    return [word for change in TINY for word in ("--set", change)]


@pytest.fixture(scope="session")
def base() -> Path:
    """The embedded model's file."""
    from pipeline.hub.models import find_model

    return find_model("smollm2-135m").path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama 3 in miniature: scaled rotary embedding, grouped heads, untied output, sharded."""
    import torch
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    from pipeline.gguf.vocabulary import PRE_TOKENIZERS

    target = tmp_path_factory.mktemp("tiny") / "llama"
    core = Tokenizer(models.BPE())
    rule = PRE_TOKENIZERS["llama-bpe"][0]["pattern"]["Regex"]
    core.pre_tokenizer = Sequence(
        [Split(Regex(rule), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([" ".join(TEXTS)] * 4, trainer)
    core.add_special_tokens(
        [AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(target)
    torch.manual_seed(1)
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=scaling,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(target, max_shard_size="100KB")
    assert (target / "model.safetensors.index.json").exists()
    return target


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter for it."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    target = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(target)
    return target
