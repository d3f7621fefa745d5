"""Small tokenizers of every kind, trained on a few texts and saved as published models do."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.hub.gguf_tokenizer import SAME_RULE
from support.models import TEXTS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
)


def save_gemma4(folder: Path) -> int:
    """Train a BPE with byte fallback on `TEXTS`, save it, and return the number of its tokens."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|tool_call>")
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in (*special, *bytes_)],
    )
    bpe.train_from_iterator([*TEXTS] * 4, trainer)
    described = json.loads(bpe.to_str())
    described["added_tokens"] = described["added_tokens"][: len(special)]
    described["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(special[4:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


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
    described["model"]["ignore_merges"] = pre_tokenizer in ("llama-bpe", "lfm2", "tekken")
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
