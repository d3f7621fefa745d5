"""What llama.cpp makes of a model's tokenizer: the tokens of training, and BOS and EOS that other
programs put around a chat, which training did not have.

llama-server renders the chat template and takes away a BOS at its start if the file says that the
tokenizer adds one (`tokenizer.ggml.add_bos_token`), an EOS at its end likewise; the tokenizer then
adds them (`apply` in llama.cpp's `common/chat.cpp`, `llama_tokenize` with add_special). So the
tokens are those of the rendered chat, as in training, except where the file says that a token is
added that the template does not write. Ollama, LM Studio and llama-cpp-python add by the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.export.verify import (
    find_mismatch,
    load_and_predict,
    overridden_tokens,
    sample_chats,
)
from pipeline.files import read_json, sha256, write_json
from pipeline.gguf.formats import KeyValue
from pipeline.gguf.merge import plan_merge, write_skeleton
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.gguf_tokenizer import save_gguf_tokenizer
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import Model
from pipeline.inference.llama.model import LoadedModel
from pipeline.system import cache_path
from pipeline.training.unsloth import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
"""Whether a space is put before a text; a SentencePiece model's file need not say so."""
_CHECK = 1
"""Version of `check_tokens`, part of a name in the cache: raise it with every change."""
_NAMED_TOKENS = 8
"""Tokens that a remark names."""


def check_tokens(model: Model) -> None:
    """Check that llama.cpp will read chats in the tokens of training, before any work is done.

    It takes some seconds, so that it was done is kept in the cache folder.

    Raises:
        GattError: it would not.
    """
    versions = "-".join(map(version, ("llama-cpp-python", "transformers", "tokenizers")))
    passed = cache_path(f"{sha256(model.path)[:16]}-tokens-{_CHECK}-{versions}.json")
    if passed.exists():
        _log_overridden(model.name, read_json(passed, list[str], "instructions"))
        return
    with TemporaryDirectory() as name:
        scratch = Path(name)
        folder = model.path
        if model.is_gguf:  # the whole checkpoint is only made for training
            folder = scratch / "tokenizer"
            save_gguf_tokenizer(open_gguf(model.path), folder)
        if converter_for(model.path):
            tokens = _read_converted(model, load_tokenizer(folder), cached_gguf(model, "F16"))
        else:
            tokens = read_as_trained(model, load_tokenizer(folder), scratch / "vocabulary.gguf")
    write_json(passed, tokens.overridden)


class TokenReading(NamedTuple):
    """How llama.cpp reads texts as in training.

    `keys` have to be written for that. `overridden` are the tokens that it reads otherwise.
    """

    keys: dict[str, KeyValue]
    overridden: list[str]


def read_as_trained(model: Model, tokenizer: PreTrainedTokenizerBase, file: Path) -> TokenReading:
    """Return how llama.cpp tokenizes chats as in training, and say which tokens it overrides.

    The keys are none, or the opposite rule for the space before a text. llama.cpp's converter takes
    that rule from settings of the tokenizer that versions of transformers read differently. `file`
    receives a GGUF of the vocabulary.

    Raises:
        GattError: the tokens differ with both rules.
    """
    keys: dict[str, KeyValue] = {}
    for _ in range(2):
        write_skeleton(plan_merge(model.path, keys=keys), file)
        mismatch, overridden = _compare(file, tokenizer)
        if not mismatch:
            _log_overridden(model.name, overridden)
            return TokenReading(keys, overridden)
        info = open_gguf(file)
        if info.field("tokenizer.ggml.model") != "llama":
            break
        keys = {_SPACE_PREFIX: not info.field(_SPACE_PREFIX, True)}  # noqa: FBT003
    raise _mismatch(mismatch)


def _read_converted(model: Model, tokenizer: PreTrainedTokenizerBase, file: Path) -> TokenReading:
    """Do the same with what llama.cpp's own converter wrote, which is exported as it is.

    Raises:
        GattError: the tokens differ.
    """
    mismatch, overridden = _compare(file, tokenizer)
    if mismatch:
        raise _mismatch(mismatch)
    _log_overridden(model.name, overridden)
    return TokenReading({}, overridden)


def _compare(file: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Return the first token that a GGUF has otherwise, or "", and the tokens that it overrides."""
    chats = sample_chats(file)
    loaded = load_and_predict(file, chats.texts, ())
    mismatch = find_mismatch(chats, loaded, tokenizer)
    return mismatch, [] if mismatch else overridden_tokens(loaded, tokenizer)


def _mismatch(text: str) -> GattError:
    return GattError(
        f"llama.cpp would tokenize a chat differently from the training tokenizer ({text}). "
        "Nothing was written. To export it nevertheless, set export.verify_tokenizer = false in "
        "the recipe (gatt export: --allow-tokenizer-mismatch)."
    )


def _log_overridden(name: str, tokens: Sequence[str]) -> None:
    if tokens:
        more = len(tokens) - _NAMED_TOKENS
        names = [*tokens[:_NAMED_TOKENS], *([f"and {more} more"] if more > 0 else [])]
        log(
            f"{name}: llama.cpp takes for control tokens what training reads as plain text: "
            f"{', '.join(names)}. It reads messages that spell these out in other tokens than "
            "training, all others in the same."
        )


def added_token_keys(file: Path) -> list[str]:
    """Return the keys that must be false, so that no program adds BOS or EOS to a GGUF's chats.

    Only the vocabulary of `file` is read. Without such keys llama.cpp has a default for each kind
    of tokenizer, so what it makes of the file decides.
    """
    info, texts = open_gguf(file), sample_chats(file).texts
    model = LoadedModel(info, vocab_only=True)
    adds_bos, adds_eos = model.added_tokens
    model.close()
    keys = []
    if adds_bos and not all(info.bos and text.startswith(info.bos) for text in texts):
        keys.append("tokenizer.ggml.add_bos_token")
    if adds_eos and not all(info.eos and text.endswith(info.eos) for text in texts):
        keys.append("tokenizer.ggml.add_eos_token")
    return keys


def set_bool(file: Path, key: str, *, value: bool) -> bool:
    """Overwrite a key of a GGUF in place; return whether the file has it."""
    import gguf

    reader = gguf.GGUFReader(file, "r+")
    field = reader.get_field(key)
    if field is None:
        return False
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    return True
