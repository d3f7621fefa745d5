"""Vocabularies as llama.cpp's converter writes them: SentencePiece, BPE with byte fallback, byte-level BPE.

Source: llama.cpp's converter as it comes with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import GattError

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}", 1)
_CASED = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_CASED[2]}|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_CASED[2]}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_WORDS, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _WORDS],
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_QWEN2), _BYTES],
    "gpt-4o": [_split(_GPT4O), _BYTES],
}
"""llama.cpp's `tokenizer.ggml.pre` and the same rule as `tokenizers` writes it in `tokenizer.json`."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class Vocabulary:
    """The tokenizer of a Hugging Face folder.

    Raises:
        GattError: no tokenizer there, or one that is not known here.
    """

    def __init__(self, folder: Path, config: dict[str, Any], architecture: str) -> None:
        self._folder, self._config, self._architecture = folder, config, architecture
        self._settings = read_object(folder / "tokenizer_config.json")
        self._tokenizer = read_object(folder / "tokenizer.json")
        self._pieces = folder / "tokenizer.model"
        self._kind = self._find_kind()
        self._pre = (
            name_of_pre_tokenizer(self._tokenizer, folder) if self._kind == "gpt2" else "default"
        )

    def _find_kind(self) -> str:
        phi4 = (
            self._architecture == "phi3"
            and self._settings.get("tokenizer_class") == "GPT2Tokenizer"
        )
        if self._pieces.is_file() and not phi4:
            return "sentencepiece"
        if not self._tokenizer:
            raise GattError(f"{self._folder} lacks tokenizer.json. A Hugging Face folder holds it.")
        model = self._tokenizer["model"]
        # What transformers makes of a GGUF says both: bytes as letters (ByteLevel), and a fallback that is never taken.
        bytes_as_letters = "ByteLevel" in str(self._tokenizer.get("pre_tokenizer"))
        falls_back = (
            model.get("type") == "BPE" and model.get("byte_fallback") and not bytes_as_letters
        )
        return "byte fallback" if falls_back and self._architecture == "llama" else "gpt2"

    @property
    def size(self) -> int:
        """How many tokens the tokenizer itself has; the embedding may hold more rows."""
        if self._kind == "sentencepiece":
            return len(self._sentencepiece()[0])
        return len(self._tokenizer["model"]["vocab"]) + len(self._tokenizer.get("added_tokens", ()))

    def write(self, writer: Any) -> None:
        """Tokens with their types, merges or scores, special tokens, chat template."""
        import gguf

        tokens: list[Any]
        scores: list[float] = []
        if self._kind == "sentencepiece":
            tokens, scores, types = self._sentencepiece()
        elif self._kind == "byte fallback":
            tokens, scores, types = map(
                list, zip(*gguf.LlamaHfVocab(self._folder).all_tokens(), strict=True)
            )
        else:
            tokens, types = token_types(self._tokenizer, int(self._config["vocab_size"]))
        writer.add_tokenizer_model("gpt2" if self._kind == "gpt2" else "llama")
        writer.add_tokenizer_pre(self._pre)
        writer.add_token_list(tokens)
        if scores:
            writer.add_token_scores(scores)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(
            self._folder, load_merges=self._kind == "gpt2", n_vocab=len(tokens)
        )
        special.add_to_gguf(writer, quiet=True)
        prefix = self._settings.get("add_prefix_space") if self._architecture == "llama" else None
        if self._architecture == "gemma2" or (
            self._architecture == "gemma3" and self._kind == "sentencepiece"
        ):
            prefix = False
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        if self._architecture == "llama" and self._config.get("vocab_size") == 49152:
            writer.add_add_bos_token(
                False
            )  # SmolLM and Granite: a BOS token is named, and not used

    def _sentencepiece(self) -> tuple[list[bytes], list[float], list[int]]:
        """Text, score and type of every token; ids that the tokenizer leaves out are unused."""
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor()
        model.LoadFromFile(str(self._pieces))
        size = int(self._config.get("vocab_size") or model.vocab_size())
        tokens, scores, types = (
            [f"[PAD{n}]".encode() for n in range(size)],
            [-10000.0] * size,
            [_UNUSED] * size,
        )
        for id in range(min(size, model.vocab_size())):
            tokens[id], scores[id], types[id] = (
                model.IdToPiece(id).encode(),
                model.GetScore(id),
                _piece_type(model, id),
            )
        for id, text, special in self._added():
            if id < size:
                plain = self._architecture == "phi3"
                control = special or (not plain and _looks_special(text))
                # llama.cpp looks for these in the text as it is, so their spaces are spaces.
                shown = text if control or plain else text.replace("\u2581", " ")
                tokens[id], scores[id], types[id] = (
                    shown.encode(),
                    -1000.0,
                    _CONTROL if control else _USER_DEFINED,
                )
        return tokens, scores, types

    def _added(self) -> list[tuple[int, str, bool]]:
        """(id, text, special?) of the tokens beside the model's own; what is said later counts."""
        older = [
            (int(id), text, False)
            for text, id in read_object(self._folder / "added_tokens.json").items()
        ]
        listed = self._settings.get("added_tokens_decoder", {})
        found = older + [
            (int(id), t["content"], bool(t.get("special"))) for id, t in listed.items()
        ]
        if self._architecture == "phi3":
            found += [
                (int(t["id"]), t["content"], bool(t["special"]))
                for t in self._tokenizer.get("added_tokens", ())
            ]
        return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise GattError(f"{path} is not JSON: {error}. Download the checkpoint again.") from error


def _piece_type(model: Any, id: int) -> int:
    asked = (
        (model.IsUnknown, _UNKNOWN),
        (model.IsControl, _CONTROL),
        (model.IsUnused, _UNUSED),
        (model.IsByte, _BYTE),
    )
    return next((kind for holds, kind in asked if holds(id)), _NORMAL)


def _looks_special(text: str) -> bool:
    """Whether a token is a control token though its tokenizer does not say so (Gemma, DeepSeek, Command R)."""
    framed = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(a) and text.endswith(b) for a, b in framed
    )


def name_of_pre_tokenizer(tokenizer: dict[str, Any], source: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        GattError: not a byte-level BPE, or a rule that is not known here (a wrong one would tokenize wrongly in silence).
    """
    found = tokenizer.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    if tokenizer["model"].get("type") == "BPE":
        for name, known in PRE_TOKENIZERS.items():
            if [_rule(step) for step in steps] == [_rule(step) for step in known]:
                return name
    raise GattError(
        f"The tokenizer of {source} is none that this version can write (known: SentencePiece, and byte-level BPE of "
        f"{', '.join(PRE_TOKENIZERS)}). Give the model's GGUF instead."
    )


def _rule(step: dict[str, Any]) -> dict[str, Any]:
    """What of a step decides where it splits; offsets do not."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def token_types(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and llama.cpp's type of each of the `size` tokens, in order of their ids; gaps are filled as unused."""
    tokens = {id: (text, _NORMAL) for text, id in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", ()):
        control = added["special"] or _looks_special(added["content"])
        shown = added["content"] if control else added["content"].replace("\u2581", " ")
        tokens[added["id"]] = (shown, _CONTROL if control else _USER_DEFINED)
    filled = [tokens.get(id, (f"[PAD{id}]", _UNUSED)) for id in range(max(size, max(tokens) + 1))]
    return [text for text, _ in filled], [kind for _, kind in filled]
