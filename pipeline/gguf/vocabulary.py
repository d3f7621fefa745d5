"""Vocabularies as llama.cpp's converter writes them: SentencePiece, BPE with byte fallback,
byte-level BPE.

Source: llama.cpp's converter in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.chat_template import DEFAULT, read_chat_templates
from pipeline.gguf.huggingface.config import read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from sentencepiece import SentencePieceProcessor

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}", 1)
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+", 1).replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]", 1
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_CONTRACTION, "").replace(r"\p{N}{1,3}", r"\p{N}", 1)
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_WORDS, "use_regex": False}


def _split(pattern: str) -> JsonObject:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS: dict[str, list[JsonObject]] = {
    "gpt-2": [_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _WORDS],
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_QWEN2), _BYTES],
    "qwen35": [_split(_QWEN35), _BYTES],
    "gpt-4o": [_split(_GPT4O), _BYTES],
    "tekken": [_split(_TEKKEN), _BYTES],
}
"""llama.cpp's `tokenizer.ggml.pre`, and the same rule as it stands in `tokenizer.json`."""
_LFM2 = "lfm2"
_OTHER_NAMES = {
    "olmo2": {"llama-bpe": "dbrx"},
    "granite": {"llama-bpe": "dbrx", "smollm": "refact"},
}
"""What llama.cpp calls a rule in the tokenizers of an architecture. Its `llama-bpe` and `lfm2` also
take whole words of the vocabulary without merges (`ignore_merges`), and its `dbrx` does not."""
_LLAMA_VOCABULARIES = ("llama", "smollm3", "granite", "mistral3")
"""Architectures whose tokenizers llama.cpp's converter treats as Llama's."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


_Kind = Literal["sentencepiece", "byte fallback", "byte level", "gemma 4"]
_GEMMA4_VISIBLE = {
    *(b"<|channel>", b"<channel|>", b'<|"|>', b"<|tool_call>", b"<tool_call|>"),
    *(b"<|tool_response>", b"<tool_response|>"),
}
"""Control tokens of Gemma 4 that llama.cpp shows, because it reads thoughts and calls from them."""


class _Token(NamedTuple):
    """The text of a token, and llama.cpp's type of it."""

    text: str
    kind: int


class _AddedToken(NamedTuple):
    """A token that the tokenizer adds to those of its model."""

    id: int
    text: str
    special: bool


class _Pieces(NamedTuple):
    """Text, score and llama.cpp's type of every token, in the order of their ids."""

    texts: list[bytes]
    scores: list[float]
    kinds: list[int]

    def set(self, id: int, text: bytes, score: float, kind: int) -> None:
        """Replace a token."""
        self.texts[id], self.scores[id], self.kinds[id] = text, score, kind


class Vocabulary:
    """The tokenizer of a Hugging Face folder.

    Raises:
        GattError: no tokenizer there, or one that is not supported.
    """

    def __init__(self, folder: Path, config: JsonObject, architecture: str) -> None:
        self._folder, self._config, self._architecture = folder, config, architecture
        self._settings = read_object(folder / "tokenizer_config.json")
        self._tokenizer = read_object(folder / "tokenizer.json")
        self._model_file = folder / "tokenizer.model"
        self._kind: _Kind = self._find_kind()
        self._pre_tokenizer = (
            name_of_pre_tokenizer(self._tokenizer, folder, architecture)
            if self._kind == "byte level"
            else "default"
        )

    def _find_kind(self) -> _Kind:
        phi4 = (
            self._architecture == "phi3"
            and self._settings.get("tokenizer_class") == "GPT2Tokenizer"
        )
        gemma4 = self._architecture == "gemma4"
        if self._model_file.is_file() and not (phi4 or gemma4):
            _load_sentencepiece(self._model_file)
            return "sentencepiece"
        file = self._folder / "tokenizer.json"
        if not file.is_file():
            raise GattError(f"{self._folder} lacks tokenizer.json. A Hugging Face folder holds it.")
        model = self._tokenizer.get("model")
        if not (isinstance(model, dict) and isinstance(model.get("vocab"), dict)):
            raise GattError(
                f"{file} has no vocabulary of tokens and ids, as a BPE has. Download the "
                "checkpoint again, or give a GGUF of the model."
            )
        # transformers converts a GGUF's tokenizer to one with both: a ByteLevel rule, and a
        # byte fallback that is never used.
        byte_level = "ByteLevel" in str(self._tokenizer.get("pre_tokenizer"))
        falls_back = model.get("type") == "BPE" and model.get("byte_fallback") and not byte_level
        if gemma4 and not falls_back:
            raise GattError(f"{file} is not a BPE with byte fallback, as Gemma 4's tokenizer is.")
        as_llama = self._architecture in _LLAMA_VOCABULARIES
        return "gemma 4" if gemma4 else "byte fallback" if falls_back and as_llama else "byte level"

    @property
    def size(self) -> int:
        """Number of tokens of the tokenizer; the embedding may have more rows."""
        if self._kind == "sentencepiece":
            return len(self._sentencepiece().texts)
        return len(self._tokenizer["model"]["vocab"]) + len(self._tokenizer.get("added_tokens", ()))

    def write(self, writer: GGUFWriter) -> None:
        """Write tokens with their types, merges or scores, special tokens, chat template."""
        import gguf

        texts: list[bytes] | list[str]
        scores: list[float] = []
        if self._kind == "sentencepiece":
            texts, scores, kinds = self._sentencepiece()
        elif self._kind in ("byte fallback", "gemma 4"):
            tokens = gguf.LlamaHfVocab(self._folder).all_tokens()
            texts, scores, kinds = map(list, zip(*tokens, strict=True))
        else:
            texts, kinds = token_types(self._tokenizer, int(self._config["vocab_size"]))
        if self._kind == "gemma 4":
            pairs = zip(texts, kinds, strict=True)
            kinds = [_USER_DEFINED if text in _GEMMA4_VISIBLE else kind for text, kind in pairs]
        else:
            writer.add_tokenizer_pre(self._pre_tokenizer)
        names = {"byte level": "gpt2", "gemma 4": "gemma4"}
        writer.add_tokenizer_model(names.get(self._kind, "llama"))
        writer.add_token_list(texts)
        if scores:
            writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        special = gguf.SpecialVocab(
            self._folder,
            load_merges=self._kind in ("byte level", "gemma 4"),
            n_vocab=len(texts),
        )
        # The order of places is transformers', which trains; the converter's differs from it.
        templates = read_chat_templates(self._folder)
        special.chat_template = (
            templates.get(DEFAULT)
            if templates.keys() <= {DEFAULT}
            else [{"name": name, "template": text} for name, text in templates.items()]
        )
        special.add_to_gguf(writer, quiet=True)
        self._write_flags(writer)

    def _write_flags(self, writer: GGUFWriter) -> None:
        """Write whether a space is put before a text, and a BOS token."""
        as_llama = self._architecture in _LLAMA_VOCABULARIES
        prefix = self._settings.get("add_prefix_space") if as_llama else None
        if self._architecture in ("gemma2", "gemma4") or (
            self._architecture == "gemma3" and self._kind == "sentencepiece"
        ):
            prefix = False
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        # SmolLM and Granite name a BOS token, but do not use it.
        if as_llama and self._config.get("vocab_size") == 49152:
            writer.add_add_bos_token(False)  # noqa: FBT003
        if self._architecture == "gemma4":
            writer.add_add_bos_token(True)  # noqa: FBT003

    def _sentencepiece(self) -> _Pieces:
        """Return every token; ids that the tokenizer leaves out are unused."""
        model = _load_sentencepiece(self._model_file)
        size = int(self._config.get("vocab_size") or model.vocab_size())
        padding = [f"[PAD{id}]".encode() for id in range(size)]
        pieces = _Pieces(padding, [-10000.0] * size, [_UNUSED] * size)
        for id in range(min(size, model.vocab_size())):
            piece = model.IdToPiece(id).encode()
            pieces.set(id, piece, model.GetScore(id), _piece_type(model, id))
        keeps_spaces = self._architecture == "phi3"
        for id, text, special in self._added():
            if id < size:
                control = special or (not keeps_spaces and _looks_special(text))
                # llama.cpp looks for user-defined tokens in the raw text, where a space is " ".
                raw = text if control or keeps_spaces else text.replace("\u2581", " ")
                kind = _CONTROL if control else _USER_DEFINED
                pieces.set(id, raw.encode(), -1000.0, kind)
        return pieces

    def _added(self) -> list[_AddedToken]:
        """Return the added tokens; of several with one id the last counts.

        transformers 5 saves those of a fast tokenizer in `tokenizer.json` alone.
        """
        older = read_object(self._folder / "added_tokens.json")
        tokens = [_AddedToken(int(id), text, special=False) for text, id in older.items()]
        decoder = self._settings.get("added_tokens_decoder") or {}
        for id, token in decoder.items():
            tokens.append(_AddedToken(int(id), token["content"], bool(token.get("special"))))
        if self._architecture == "phi3" or not decoder:
            for token in self._tokenizer.get("added_tokens", ()):
                special = bool(token["special"])
                tokens.append(_AddedToken(int(token["id"]), token["content"], special))
        return tokens


def _load_sentencepiece(file: Path) -> SentencePieceProcessor:
    """Return a SentencePiece model.

    Raises:
        GattError: the file is none, or a damaged one.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(file))
        if model.vocab_size() < 1:
            raise RuntimeError("no tokens")
    except (OSError, RuntimeError) as error:
        raise GattError(
            f"{file} is not a SentencePiece model, or a damaged one "
            f"({file.stat().st_size:,} bytes). Download the checkpoint again."
        ) from error
    return model


def _piece_type(model: SentencePieceProcessor, id: int) -> int:
    if model.IsUnknown(id):
        return _UNKNOWN
    if model.IsControl(id):
        return _CONTROL
    if model.IsUnused(id):
        return _UNUSED
    return _BYTE if model.IsByte(id) else _NORMAL


def _looks_special(text: str) -> bool:
    """Return whether a token is a control token that its tokenizer does not mark as one.

    So do those of Gemma, DeepSeek and Command R.
    """
    framed = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in framed
    )


def name_of_pre_tokenizer(tokenizer: JsonObject, source: Path, architecture: str = "") -> str:
    """Return llama.cpp's name for the pre-tokenizer of a `tokenizer.json`.

    Raises:
        GattError: not a byte-level BPE, or an unknown rule, which is not guessed: a wrong one would
            tokenize wrongly without an error.
    """
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    if tokenizer["model"].get("type") == "BPE":
        for name, known_steps in PRE_TOKENIZERS.items():
            if [_splitting(step) for step in steps] == [_splitting(step) for step in known_steps]:
                if (name, architecture) == ("llama-bpe", _LFM2):
                    return _LFM2
                ignores_merges = tokenizer["model"].get("ignore_merges")
                other = _OTHER_NAMES.get(architecture, {})
                return name if ignores_merges else other.get(name, name)
    raise GattError(
        f"The tokenizer of {source} is not supported (supported: SentencePiece, and byte-level BPE "
        f"of {', '.join(PRE_TOKENIZERS)}). Give a GGUF of the model instead."
    )


def _splitting(step: JsonObject) -> JsonObject:
    """Return the keys of a step that decide where it splits; offsets do not.

    To remove what no pattern matches is to isolate the matches, where they cover every text.
    """
    rule = {key: value for key, value in step.items() if key != "trim_offsets"}
    if rule.get("behavior") == "Removed" and rule.get("invert"):
        rule |= {"behavior": "Isolated", "invert": False}
    return rule


def token_types(tokenizer: JsonObject, size: int) -> tuple[list[str], list[int]]:
    """Return the text and llama.cpp's type of each of the `size` tokens, by their ids.

    Ids without a token are filled as unused.
    """
    tokens = {id: _Token(text, _NORMAL) for text, id in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", ()):
        text = added["content"]
        if added["special"] or _looks_special(text):
            tokens[added["id"]] = _Token(text, _CONTROL)
        else:
            tokens[added["id"]] = _Token(text.replace("\u2581", " "), _USER_DEFINED)
    ids = range(max(size, max(tokens) + 1))
    filled = [tokens.get(id, _Token(f"[PAD{id}]", _UNUSED)) for id in ids]
    return [token.text for token in filled], [token.kind for token in filled]
