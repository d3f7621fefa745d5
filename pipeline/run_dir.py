"""Every path of a run, and what in it is done.

A stage is *done* when its manifest names the same recipe and the same inputs (by hash) as now. The manifest is written
last, so its presence means that the stage's files are whole.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.files import sha256, write_json, write_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml

STAGES = ("instructions", "synthesize", "train", "export", "evaluate", "report")
"""The stages of a run in order; each has a folder of its name."""
_PACKAGES = ("llama-cpp-python", "unsloth", "torch", "transformers", "peft", "datasets", "gguf")


class RunDir:
    """The folder of one run, which may be one that can only be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lists = path / "lists.toml"
        self.pairs = path / "instructions" / "pairs.json"
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
        """The exported file."""
        return self.path / "export" / f"tuned-{format_name}.gguf"

    def save_recipe(self, recipe: Recipe) -> None:
        """Keep the resolved recipe beside the results.

        Raises:
            GattError: the folder cannot be written.
        """
        try:
            write_text(self.path / "recipe.toml", recipe_toml(recipe, comments=False))
        except OSError as error:
            raise GattError(
                f"Cannot write in the run folder {self.path} ({error.strerror}). Choose another with --run."
            ) from error

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote down about itself, or None."""
        path = self.path / stage / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def is_done(self, stage: str, settings: str, inputs: list[Path]) -> bool:
        """Whether `stage` has finished with these settings and inputs."""
        manifest = self.manifest(stage)
        return manifest is not None and (manifest["settings"], manifest["inputs"]) == (
            _hash(settings),
            _hashes(inputs),
        )

    def claim(self, stage: str, settings: str, inputs: list[Path]) -> None:
        """Before a stage works: what an earlier, different attempt left is moved aside, never mixed in."""
        folder = self.path / stage
        started = folder / "started.json"
        mine = {"settings": _hash(settings), "inputs": _hashes(inputs)}
        if started.exists() and json.loads(started.read_text(encoding="utf-8")) != mine:
            folder.rename(folder.with_name(f"{stage}.{time.strftime('%Y%m%d-%H%M%S')}.old"))
        (folder / "manifest.json").unlink(missing_ok=True)
        write_json(started, mine)

    def finish(self, stage: str, settings: str, inputs: list[Path], seconds: float) -> None:
        """Write the manifest of a finished stage."""
        write_json(
            self.path / stage / "manifest.json",
            {
                "settings": _hash(settings),
                "inputs": _hashes(inputs),
                "seconds": round(seconds, 1),
                **_versions(),
            },
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hashes(inputs: list[Path]) -> dict[str, str]:
    return {path.name: sha256(path) for path in inputs}


def _versions() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "versions": versions,
        "commit": commit.stdout.strip() or "none",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
