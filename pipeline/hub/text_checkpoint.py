"""A plain 16-bit checkpoint of a text model: what transformers, Unsloth and llama.cpp's own
converter load.

It is made of checkpoints that they would load as something else: the text part of a multimodal
model, and weights in 4 or 8 bits.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import whole_file, write_json
from pipeline.gguf import ggml
from pipeline.gguf.base import Bytes, JsonObject
from pipeline.gguf.families import DRAFTS
from pipeline.gguf.huggingface.config import read_object, require_object, text_part
from pipeline.gguf.huggingface.keys import text_model_key
from pipeline.gguf.huggingface.safetensors import (
    GGML_TYPES,
    INTEGERS,
    SafetensorsTensor,
    Weights,
    open_safetensors,
    shards,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_LEFT_OUT = ("quantization_config", "compression_config", "auto_map")
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_TIED = "tie_word_embeddings"
_BLOCK = 1 << 22
"""Weights in memory at a time."""


class TextModel(NamedTuple):
    """A text model in a folder, which may hold more.

    `settings` are its `config.json` with transformers' class of it, `weights` are by their keys in
    that class.
    """

    folder: Path
    settings: JsonObject
    weights: Mapping[str, Weights]


@cache
def language_models() -> dict[str, str]:
    """Return transformers' classes of text models by `model_type`.

    Classes that see or hear are left out, whose text models have a type of their own, and drafts.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    first = {k: v[0] if isinstance(v, list | tuple) else str(v) for k, v in names}
    return {
        model_type: name
        for model_type, name in first.items()
        if not name.endswith("ForConditionalGeneration") and name not in DRAFTS
    }


def text_class(config: JsonObject) -> str:
    """Return transformers' class of a text model, or of the text part of a multimodal one.

    It is "" where transformers has none.
    """
    names, text = config.get("architectures"), config.get("text_config")
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name in language_models().values():
        return name
    return language_models().get(str(text.get("model_type")), "") if isinstance(text, dict) else ""


def text_settings(folder: Path) -> JsonObject:
    """Return the `config.json` of a folder, of a multimodal model that of its text part.

    Raises:
        GattError: it is missing or damaged.
    """
    config = require_object(folder / "config.json")
    if not isinstance(config.get("text_config"), dict):
        return config
    _log_once(f"{folder.name}: a multimodal model; only its text part is used.")
    return {**text_part(config), "architectures": [text_class(config)]}


_log_once = cache(log)


def transformers_config(settings: JsonObject) -> PreTrainedConfig:
    """Return transformers' configuration of a `config.json`.

    It is read from a file: `from_dict` does not know how transformers writes infinity.
    """
    from transformers import AutoConfig, PreTrainedConfig

    with TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "config.json", settings)
        config = AutoConfig.from_pretrained(scratch, local_files_only=True)
    assert isinstance(config, PreTrainedConfig)
    return config


def read_text_model(folder: Path) -> TextModel:
    """Return the text model in a folder of any family.

    Raises:
        GattError: a file is missing or damaged, or the weights of the text model are not under
            names that this version knows, or not in 16 or 32 bits.
    """
    stored = {k: tensor for file in shards(folder) for k, tensor in open_safetensors(file).items()}
    settings, keys = text_settings(folder), text_keys(folder, stored)
    weights = {key: stored[name] for key, name in keys.items()}
    for key, tensor in weights.items():
        if keys[key] != key and tensor.dtype not in (*GGML_TYPES, *INTEGERS):
            raise GattError(
                f"{tensor.file}: {keys[key]} is of type {tensor.dtype}; F32, F16 or BF16 expected. "
                "Take the 16-bit model."
            )
    if keys.keys() != stored.keys() and _OUTPUT not in keys:
        if require_object(folder / "config.json")["text_config"].get(_TIED) is False:
            raise GattError(
                f"{folder}: config.json says {_TIED} = false, and no weight is known as the text "
                f"model's {_OUTPUT}. Download the checkpoint again."
            )
        settings = {**settings, _TIED: True}  # a text model's default may be another
    return TextModel(folder, settings, weights)


def text_keys(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return what a checkpoint calls its weights (`names`), by their keys in its text model.

    Raises:
        GattError: it is multimodal, and its text model has names that this version does not know.
    """
    if not isinstance(require_object(folder / "config.json").get("text_config"), dict):
        return {name: name for name in names}
    keys = {key: name for name in names if (key := text_model_key(name))}
    if _EMBEDDING not in keys:
        raise GattError(
            f"{folder} is a multimodal model in which no weight is known as its text model's "
            f"{_EMBEDDING}. Take a text model."
        )
    return keys


def require_text_index(folder: Path) -> None:
    """Check the names of the weights before they are downloaded, where an index lists them.

    Raises:
        GattError: as `text_keys`.
    """
    if index := read_object(folder / "model.safetensors.index.json").get("weight_map"):
        text_keys(folder, index)


def write_text_checkpoint(model: TextModel, target: Path) -> None:
    """Write a text model to the folder `target`, with its tokenizer.

    Raises:
        GattError: weights are missing or damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(model.weights, target / "model.safetensors")
    for pattern in _COPIED:
        for file in model.folder.glob(pattern):
            copy = target / file.relative_to(model.folder)
            copy.parent.mkdir(exist_ok=True)
            if not file.name.endswith("safetensors.index.json"):
                shutil.copyfile(file, copy)
    settings = {key: value for key, value in model.settings.items() if key not in _LEFT_OUT}
    write_json(target / "config.json", settings)


def write_safetensors(weights: Mapping[str, Weights], target: Path) -> None:
    """Write one safetensors file: a length, a JSON header, then the data in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in weights.items():
        end = start + _bytes(tensor)
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            for block in _blocks(tensor):
                out.write(block.data)


def _bytes(tensor: Weights) -> int:
    if isinstance(tensor, SafetensorsTensor):
        return tensor.data.nbytes
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape) // columns
    return rows * ggml.row_bytes(GGML_TYPES[tensor.dtype], columns)


def _blocks(tensor: Weights) -> Iterator[Bytes]:
    """Yield the bytes of a tensor some rows at a time."""
    if isinstance(tensor, SafetensorsTensor):
        yield np.asarray(tensor.data)
        return
    columns = tensor.shape[-1]
    rows, step = math.prod(tensor.shape) // columns, max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        values = tensor.load(slice(first, min(first + step, rows)))
        yield ggml.quantize(values, GGML_TYPES[tensor.dtype])
