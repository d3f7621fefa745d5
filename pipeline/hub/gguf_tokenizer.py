"""The tokenizer of a GGUF as `tokenizer.json`, with the same tokens as llama.cpp has for a text.

transformers converts them too, but loses the merges of Gemma's and the bytes of Phi-3's, and takes
GPT-2's pre-tokenizer for every byte-level BPE.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.reader import GgufInfo
from pipeline.gguf.vocabulary import PRE_TOKENIZERS

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""llama.cpp's types of the tokens that it looks for in a text before anything else."""
SAME_RULE = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "dbrx": "llama-bpe",
    "lfm2": "llama-bpe",
    "smaug-bpe": "llama-bpe",
    "refact": "smollm",
    "deepseek-r1-qwen": "qwen2",
}
"""Other names of pre-tokenizers in llama.cpp (`llama_vocab::impl::load`)."""
_WITH_MERGES = ("dbrx", "smaug-bpe")
"""Names of Llama 3's rule under which llama.cpp does not look for whole words first."""
_SPACE = "\u2581"
"""SentencePiece's sign for a space."""


def save_gguf_tokenizer(info: GgufInfo, folder: Path) -> None:
    """Save the tokenizer of a GGUF to `folder`, with its special tokens and chat template.

    Raises:
        GattError: a kind of tokenizer that is not supported.
    """
    import transformers
    from tokenizers import Tokenizer

    require_tokenizer(info)
    byte_level = info.field("tokenizer.ggml.model") == "gpt2"
    tokens = list(map(str, info.field("tokenizer.ggml.tokens")))
    types = info.field("tokenizer.ggml.token_type", [1] * len(tokens))
    description = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": id,
                "content": text,
                "special": type_ != _USER_DEFINED,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for id, (text, type_) in enumerate(zip(tokens, types, strict=True))
            if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        **(_byte_level(info, tokens) if byte_level else _byte_fallback(info, tokens)),
    }
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token=info.bos or None,
        eos_token=info.eos,
        unk_token=info.token("unknown") or None,
        pad_token=info.token("padding") or info.eos,
    )
    tokenizer.chat_template = info.chat_template
    tokenizer.save_pretrained(folder)


def require_tokenizer(info: GgufInfo) -> None:
    """Check that a GGUF's tokenizer is of a supported kind.

    Raises:
        GattError: it is not.
    """
    kind, rule = info.field("tokenizer.ggml.model"), info.field("tokenizer.ggml.pre")
    unknown = ""
    if kind not in ("gpt2", "llama", "gemma4"):
        unknown = f"tokenizer.ggml.model = {kind!r}"
    elif kind == "gpt2" and SAME_RULE.get(rule, rule) not in PRE_TOKENIZERS:
        unknown = f"tokenizer.ggml.pre = {rule!r}"
    if unknown:
        raise GattError(
            f"{info.path}: {unknown} found; 'gpt2' with the pre-tokenizer of "
            f"{', '.join(PRE_TOKENIZERS)}, 'llama' or 'gemma4' expected. Take the model's Hugging "
            "Face folder."
        )


def _byte_level(info: GgufInfo, tokens: list[str]) -> JsonObject:
    """Return the parts of a byte-level BPE."""
    name = info.field("tokenizer.ggml.pre")
    rule = SAME_RULE.get(name, name)
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {text: id for id, text in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in info.field("tokenizer.ggml.merges", [])],
            # llama.cpp looks for whole words first for Llama 3 (`llama_vocab::impl::load`).
            "ignore_merges": rule in ("llama-bpe", "tekken") and name not in _WITH_MERGES,
        },
    }


def _byte_fallback(info: GgufInfo, tokens: list[str]) -> JsonObject:
    """Return the parts of a BPE with byte fallback; of Gemma 4, a file has the merges."""
    vocabulary = {text: id for id, text in enumerate(tokens)}
    stored = info.field("tokenizer.ggml.merges")
    merges = [merge.split(" ") for merge in stored] if stored else _merges(info, vocabulary)
    prefix = bool(info.field("tokenizer.ggml.add_space_prefix", True))  # noqa: FBT003
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    decoders: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "unk_token": info.token("unknown") or None,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges(info: GgufInfo, vocabulary: dict[str, int]) -> list[list[str]]:
    """Return the merges of a SentencePiece model in their order, which follow from its scores.

    It joins the pair whose token has the highest score, as llama.cpp does.
    """
    scores = info.field("tokenizer.ggml.scores", [0.0] * len(vocabulary))
    merges = [
        (-scores[vocabulary[text]], vocabulary[text[:n]], vocabulary[text[n:]], text[:n], text[n:])
        for text in vocabulary
        for n in range(1, len(text))
        if text[:n] in vocabulary and text[n:] in vocabulary
    ]
    return [[left, right] for *_, left, right in sorted(merges)]
