"""Byte-level BPE vocabularies: the names by which llama.cpp knows a pre-tokenizer, and the types of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import GattError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_WORDS, "use_regex": False}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _WORDS],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False}, _BYTES],
}
"""llama.cpp's `tokenizer.ggml.pre` and the same rule as `tokenizers` writes it in `tokenizer.json`."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def name_of_pre_tokenizer(tokenizer: dict[str, Any], source: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        GattError: not a byte-level BPE, or a rule that is not known here (a wrong one would tokenise wrongly in silence).
    """
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    if tokenizer["model"].get("type") == "BPE":
        for name, known in PRE_TOKENIZERS.items():
            if [_rule(step) for step in steps] == [_rule(step) for step in known]:
                return name
    raise GattError(
        f"The tokenizer of {source} is none that this version can write (known: byte-level BPE of "
        f"{', '.join(PRE_TOKENIZERS)}). Give the model's GGUF instead."
    )


def _rule(step: dict[str, Any]) -> dict[str, Any]:
    """What of a step decides where it splits; offsets do not."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def token_types(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and llama.cpp's type of each of the `size` tokens, in order of their ids; gaps are filled as unused."""
    tokens = {id: (text, _NORMAL) for text, id in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    filled = [tokens.get(id, (f"[PAD{id}]", _UNUSED)) for id in range(max(size, max(tokens) + 1))]
    return [text for text, _ in filled], [kind for _, kind in filled]
