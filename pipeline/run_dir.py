"""The paths of a run, and which of its stages are done.

A stage is *done* if its manifest names the same settings and inputs (by hash) as now. The
manifest is written last, so its presence means that the files of the stage are complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict

from pipeline.errors import GattError
from pipeline.files import sha256, write_json, write_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml

STAGES = ("instructions", "synthesize", "train", "export", "evaluate", "report")
"""The stages of a run in order; each has a folder of its name."""
_PACKAGES = ("llama-cpp-python", "unsloth", "torch", "transformers", "peft", "datasets", "gguf")
"""Packages whose versions a manifest records."""


class Fingerprint(TypedDict):
    """SHA-256 of what a stage depends on: its settings, and its input files by name."""

    settings: str
    inputs: dict[str, str]


class Manifest(Fingerprint):
    """The record of a finished stage; a package or commit that is not known is "none"."""

    seconds: float
    versions: dict[str, str]
    commit: str
    python: str
    platform: str
    finished: str


class RunDir:
    """The folder of a run. It is created on the first write, so it may be read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.toml"
        self.lists = path / "lists.toml"
        self.assignments = path / "instructions" / "assignments.json"
        self.suites = path / "instructions" / "suites.json"
        self.answers = path / "synthesize" / "answers.jsonl"
        self.examples = path / "synthesize" / "dialogues.jsonl"
        self.card = path / "synthesize" / "README.md"
        self.acceptance = path / "synthesize" / "acceptance.json"
        self.adapter = path / "train" / "adapter"
        self.checkpoints = path / "train" / "checkpoints"
        self.losses = path / "train" / "losses.json"
        self.speed = path / "train" / "speed.json"
        self.validation = path / "train" / "validation.jsonl"
        self.reference = path / "train" / "reference.npz"
        self.exported = path / "export" / "export.json"
        self.replies = path / "evaluate" / "replies.jsonl"
        self.judged = path / "evaluate" / "judged.jsonl"
        self.attention = path / "evaluate" / "attention.json"
        self.scores = path / "evaluate" / "scores.json"
        self.report = path / "report"

    def tuned(self, format_name: str) -> Path:
        """Return the path of the exported model in a format of llama.cpp."""
        return self.path / "export" / f"tuned-{format_name}.gguf"

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe to `recipe.toml`.

        Raises:
            GattError: the folder cannot be written.
        """
        try:
            write_text(self.recipe, recipe_toml(recipe, comments=False))
        except OSError as error:
            raise GattError(
                f"Cannot write in the run folder {self.path} ({error.strerror}). Choose another "
                "with --run."
            ) from error

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage, or None."""
        path = self.path / stage / "manifest.json"
        if not path.exists():
            return None
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest

    def is_done(self, stage: str, settings: str, inputs: Sequence[Path]) -> bool:
        """Return whether `stage` has finished with these settings and inputs."""
        manifest, current = self.manifest(stage), _fingerprint(settings, inputs)
        return manifest is not None and all(
            manifest[key] == current[key] for key in ("settings", "inputs")
        )

    def claim(self, stage: str, settings: str, inputs: Sequence[Path]) -> None:
        """Prepare the folder of a stage that is about to run.

        What an attempt with the same settings and inputs left stays, and is resumed. What another
        one left is moved aside, never mixed in.
        """
        folder, fingerprint = self.path / stage, _fingerprint(settings, inputs)
        started = folder / "started.json"
        if started.exists() and json.loads(started.read_text(encoding="utf-8")) != fingerprint:
            folder.rename(folder.with_name(f"{stage}.{time.strftime('%Y%m%d-%H%M%S')}.old"))
        (folder / "manifest.json").unlink(missing_ok=True)
        write_json(started, fingerprint)

    def finish(self, stage: str, settings: str, inputs: Sequence[Path], seconds: float) -> None:
        """Write the manifest of a finished stage."""
        manifest: Manifest = {
            **_fingerprint(settings, inputs),
            "seconds": round(seconds, 1),
            "versions": {package: _version(package) for package in _PACKAGES},
            "commit": _commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(self.path / stage / "manifest.json", manifest)


def _fingerprint(settings: str, inputs: Sequence[Path]) -> Fingerprint:
    return {
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "inputs": {path.name: sha256(path) for path in inputs},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Return the commit of this code, if it runs from a Git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return "none"
    return result.stdout.strip() or "none"
