"""What a Hugging Face folder says about itself: its name, and the model card in `README.md`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import log

if TYPE_CHECKING:
    import gguf


def checkpoint_name(folder: Path) -> str:
    """Return a folder's name; of a snapshot in the Hub's cache, that of the repository."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name or folder.resolve().name


def read_metadata(folder: Path, parameters: int) -> gguf.Metadata:
    """Return what a GGUF of a folder says about itself; `parameters` is negative of an adapter.

    A model card that cannot be read is left out.
    """
    import gguf
    import yaml

    name = checkpoint_name(folder)
    try:
        metadata = gguf.Metadata.load(None, folder, None, parameters)
    except (yaml.YAMLError, ValueError) as error:
        log(f"{folder / 'README.md'} is left out: its front matter is not YAML: {error!r:.99}.")
        metadata = gguf.Metadata()
    title = gguf.Metadata.id_to_title(folder.name)
    if name != folder.name and metadata.name in (None, title):
        metadata.name = name
    settings = gguf.Metadata.load_hf_parameters(folder)
    metadata = gguf.Metadata.apply_metadata_heuristic(
        metadata, None, settings, Path(name), parameters
    )
    metadata.name = metadata.name or name
    return metadata
