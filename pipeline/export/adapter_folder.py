"""What is saved beside an adapter: the tokenizer and the chat template that it was trained with,
and the name of its base.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import write_json, write_text
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.huggingface.config import require_object, text_part
from pipeline.gguf.huggingface.model_card import checkpoint_name
from pipeline.gguf.lora.settings import CONFIG, WEIGHTS, LoraSettings
from pipeline.gguf.lora.weights import read_adapter, text_tensors
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import Model
from pipeline.training.unsloth import load_tokenizer

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_CONVERTED = re.compile(
    r"(-unsloth)?(-bnb-[48]bit|-(awq|gptq)(-int[48])?|-[48]bit|-gguf|[-.](i?q\d|b?f16|f32)[\w.]*)$"
)
"""What names of quantized or converted copies end with."""
_SHOWN_TOKENS = 5


def with_adapters_tokenizer(model: Model, adapter: Path, scratch: Path) -> Model:
    """Return `model` with the tokenizer and the chat template that are saved beside the adapter.

    It is `model` itself where they do not differ, or else a folder in `scratch` with links to the
    weights.

    Raises:
        GattError: the adapter has tokens that neither it nor the model has embeddings for, or its
            tokenizer is of another base.
    """
    lora = read_adapter(adapter)
    _compare_base(model, lora.settings)
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    template = read_chat_template(adapter)
    if not (own_tokenizer or template or lora.vocabulary_rows):
        return model
    checkpoint = cached_checkpoint(model)
    rows = _vocabulary_rows(checkpoint)
    added, end = [], ""
    if own_tokenizer:
        added = _new_tokens(adapter, checkpoint, max(rows, lora.vocabulary_rows))
        ends = [load_tokenizer(folder.resolve()).eos_token for folder in (adapter, checkpoint)]
        end = "" if ends[0] == ends[1] else str(ends[0] or "")
    base_template = read_chat_template(checkpoint)
    new_template = template.strip() not in ("", base_template.strip())
    if not (added or end or new_template or lora.vocabulary_rows > rows):
        return model
    if added:
        log(f"export: {_names(added)} of the tokenizer in {adapter} are added to {model.name}'s.")
    if end:
        log(f"export: an answer ends with {end}, as the tokenizer in {adapter} says.")
    if new_template:
        log(
            f"export: the chat template is the one in {adapter}, with which the adapter was "
            f"trained; {model.name} has {'another one' if base_template else 'none'}."
        )
    folder = scratch / (model.name if model.is_gguf else checkpoint_name(model.path))
    _link_checkpoint(checkpoint, folder, adapter if added else None)
    if end and not added:
        settings = require_object(checkpoint / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**settings, "eos_token": end})
    write_text(folder / "chat_template.jinja", template or base_template)
    if lora.vocabulary_rows > rows:
        config = require_object(checkpoint / "config.json")
        write_json(folder / "config.json", {**config, "vocab_size": lora.vocabulary_rows})
    return Model(model.name, folder, model.repository)


def for_text_model(adapter: Path, scratch: Path) -> Path:
    """Return an adapter that PEFT can load into a text model.

    It is a copy in `scratch` where the adapter was trained within a multimodal model.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / WEIGHTS)
    text = text_tensors(tensors)
    if text.keys() == tensors.keys():
        return adapter
    if len(text) < len(tensors):
        log("export: the adapter's changes of parts other than the text model are left out.")
    folder = scratch / "text-adapter"
    folder.mkdir()
    save_file(text, folder / WEIGHTS)
    lora = read_adapter(adapter)
    names = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    # Patterns of ranks and alphas may name the text model, too.
    root = 0.5 if lora.settings.rslora else 1
    settings = {
        **require_object(adapter / CONFIG),
        **names,
        "target_modules": sorted(lora.deltas),
        "rank_pattern": {module: delta.rank for module, delta in lora.deltas.items()},
        "alpha_pattern": {m: delta.scale * delta.rank**root for m, delta in lora.deltas.items()},
    }
    write_json(folder / CONFIG, settings)
    return folder


def _vocabulary_rows(checkpoint: Path) -> int:
    return int(text_part(require_object(checkpoint / "config.json"))["vocab_size"])


def _new_tokens(adapter: Path, checkpoint: Path, rows: int) -> list[str]:
    """Return the tokens of the adapter's tokenizer that the base does not have.

    A padding token alone is left out if it has no row: nothing is ever generated from it.

    Raises:
        GattError: a token has no row in the embedding, or another id than in the base.
    """
    tokenizer = load_tokenizer(adapter.resolve())
    own, base = tokenizer.get_vocab(), load_tokenizer(checkpoint.resolve()).get_vocab()
    moved = [text for text, id in own.items() if base.get(text, id) != id]
    if moved:
        raise GattError(
            f"The tokenizer in {adapter} gives {_names(moved)} other ids than {checkpoint.name} "
            "does: the adapter is of another base. Give the base that it was trained on."
        )
    added = [text for text in own if text not in base]
    without_row = [text for text in added if own[text] >= rows]
    if added == without_row == [tokenizer.pad_token]:
        log(f"export: without {added[0]}, with which the adapter's training was padded.")
        return []
    if without_row:
        raise GattError(
            f"The tokenizer in {adapter} has {_names(without_row)}, for which {checkpoint.name} "
            f"has no embedding ({rows:,} rows) and the adapter brings none. Train and save it with "
            'modules_to_save = ["embed_tokens", "lm_head"]. If no chat has these tokens, remove '
            "the tokenizer's files from the adapter's folder."
        )
    return added


def _names(tokens: list[str]) -> str:
    shown = ", ".join(sorted(tokens)[:_SHOWN_TOKENS])
    return f"{len(tokens)} tokens ({shown}{', ...' if len(tokens) > _SHOWN_TOKENS else ''})"


def _link_checkpoint(checkpoint: Path, folder: Path, tokenizer: Path | None) -> None:
    """Fill `folder` with links to a checkpoint's files, but for those of its chat templates.

    With `tokenizer`, the files of the tokenizer there take the place of the checkpoint's.
    """
    sources = {file.name: file for file in checkpoint.iterdir() if file.is_file()}
    for name in _TOKENIZER_FILES if tokenizer else ():
        if tokenizer and (tokenizer / name).is_file():
            sources[name] = tokenizer / name
    folder.mkdir()
    for name, file in sources.items():
        if name in _TEMPLATE_FILES:
            continue
        try:
            (folder / name).symlink_to(file.resolve())
        except OSError:  # Windows lets only administrators make links
            shutil.copyfile(file, folder / name)


def _compare_base(model: Model, settings: LoraSettings) -> None:
    """Say so if the adapter names another base than the one that is given."""
    if settings.revision not in ("", "main"):
        log(f"export: the adapter was trained on revision {settings.revision} of its base.")
    named = settings.base
    if not named or Path(named) in (model.path, cached_checkpoint(model)):
        return
    given = {model.repository, model.name, str(model.path.resolve())}
    if plain_name(named) not in map(plain_name, given):
        log(f"export: the adapter names {named} as its base; the base given is {model.name}.")


def plain_name(name: str) -> str:
    """Return the name of a model without its owner, and without the marks of a copy of it."""
    cached = re.search(r"models--[^/\\]+?--([^/\\]+)", name)
    last = cached[1] if cached else name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return _CONVERTED.sub("", last.lower().removesuffix(".gguf"))
