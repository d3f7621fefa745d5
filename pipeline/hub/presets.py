"""The base models that have a short name: `models/*.toml`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tomlkit

from pipeline.hub.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A base model with a short name: its repository on the Hub, and its sizes.

    `license` is an id of the Hub, `context` the tokens that the model was made for, and `thinking`
    tells whether it thinks: "no", or "switchable" where its template can switch that off. `package`
    names the Python package that contains the model as a GGUF file; "" downloads the repository.
    """

    repository: str
    shape: ModelShape
    license: str
    context: int
    thinking: str
    package: str = ""


def presets() -> dict[str, Preset]:
    """Return the presets by name, in the order of their names."""
    packaged = Path(str(resources.files("pipeline"))) / "models"
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "models"
    return {file.stem: _read(file) for file in sorted(folder.glob("*.toml"))}


def _read(file: Path) -> Preset:
    values = tomlkit.parse(file.read_text(encoding="utf-8")).unwrap()
    return Preset(**{**values, "shape": ModelShape(**values["shape"])})
