"""The paths of a run, and which of its stages are done.

A stage is *done* if its manifest names the same settings and inputs (by hash) as now. The
manifest is written last, so its presence means that the files of the stage are complete. While a
process works in the folder, it holds its lock.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple, TypedDict

from pipeline.files import sha256, write_json, write_text
from pipeline.folders import lock_folder
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml

STAGES = ("instructions", "synthesize", "train", "export", "evaluate", "report")
"""The stages of a run in order; each has a folder of its name."""
_PACKAGES = ("llama-cpp-python", "unsloth", "torch", "transformers", "peft", "datasets", "gguf")
"""Packages whose versions a manifest records."""


_PYTHON_FILE = re.compile(r".*\.py( \(\d+\))?", re.DOTALL)
"""The name of an input that is a user's function, numbered where two have the same."""
_FINGERPRINT_VERSION = 3
RECIPE_CHANGE = "the recipe"
"""What has changed since a stage has finished, if it is not an input."""


class HubRevision(NamedTuple):
    """A dataset on the Hub at its newest commit; "" if the Hub could not be asked."""

    repository: str
    commit: str


Input = Path | HubRevision
"""What a stage reads: a file, a folder with all of its files, or a dataset."""


class Fingerprint(TypedDict):
    """SHA-256 of what a stage depends on: its settings, and its inputs by name.

    `version` is that of the list of inputs; files without it lack some of them.
    """

    settings: str
    inputs: dict[str, str]
    version: int


class _Started(Fingerprint):
    """The record of a stage that is not finished; `seconds` are those of interrupted sessions."""

    seconds: float


class Manifest(Fingerprint):
    """The record of a finished stage; a package or commit that is not known is "none".

    `seconds` are those of all sessions. `notes` are what the stage did otherwise than asked for:
    the parameters that a server has refused, by model.
    """

    notes: dict[str, dict[str, str]]
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
        self.training_log = path / "train" / "unsloth.log"
        self.losses = path / "train" / "losses.json"
        self.speed = path / "train" / "speed.json"
        self.validation = path / "train" / "validation.jsonl"
        self.reference = path / "train" / "reference.npz"
        self.exported = path / "export" / "export.json"
        self.replies = path / "evaluate" / "replies.jsonl"
        self.judged = path / "evaluate" / "judged.jsonl"
        self.attention = path / "evaluate" / "attention.json"
        self.scores = path / "evaluate" / "scores.json"
        self.conditions = path / "evaluate" / "conditions"
        self.report = path / "report"
        self.outdated: Sequence[str] = ()
        """Finished stages since which the recipe has changed, once they were looked for."""
        self._notes: dict[str, dict[str, dict[str, str]]] = {}

    def note(self, stage: str, model: str, changes: Mapping[str, str]) -> None:
        """Remember what the manifest of a running stage will say about a model, if anything."""
        if changes:
            self._notes.setdefault(stage, {})[model] = dict(changes)

    def tuned(self, format_name: str) -> Path:
        """Return the path of the exported model in a format of llama.cpp."""
        return self.path / "export" / f"tuned-{format_name}.gguf"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from working in this folder until the block ends.

        Raises:
            GattError: another one does, or the folder cannot be written.
        """
        with lock_folder(self.path, "--run"):
            yield

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe to `recipe.toml`."""
        write_text(self.recipe, recipe_toml(recipe, comments=False))

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage, or None."""
        path = self.path / stage / "manifest.json"
        if not path.exists():
            return None
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest

    def changes(self, stage: str, settings: str, inputs: Sequence[Input]) -> list[str] | None:
        """Return what has changed since `stage` has finished; None if it has not finished."""
        manifest = self.manifest(stage)
        if manifest is None:
            return None
        finished = (self.path / stage / "manifest.json").stat().st_mtime
        return _changes(manifest, finished, settings, inputs)

    def claim(self, stage: str, settings: str, inputs: Sequence[Input]) -> None:
        """Prepare the folder of a stage that is about to run.

        What an attempt with the same settings and inputs left stays, and is resumed. What another
        one left is moved aside, never mixed in. An attempt that a user's Python function has
        stopped is resumed with the corrected one.
        """
        folder, fingerprint = self.path / stage, _fingerprint(settings, inputs)
        started, seconds = folder / "started.json", 0.0
        if started.exists():
            earlier = _read_started(started)
            changes = _changes(earlier, started.stat().st_mtime, settings, inputs)
            if not (folder / "manifest.json").exists():
                seconds = earlier["seconds"]
                changes = [name for name in changes if not _PYTHON_FILE.fullmatch(name)]
            if changes:
                folder.rename(_unused(folder, time.strftime("%Y%m%d-%H%M%S")))
                seconds = 0.0
        (folder / "manifest.json").unlink(missing_ok=True)
        write_json(started, {**fingerprint, "seconds": seconds})

    def interrupt(self, stage: str, seconds: float) -> None:
        """Record how long a session took that did not finish its stage."""
        file = self.path / stage / "started.json"
        started = _read_started(file)
        write_json(file, {**started, "seconds": started["seconds"] + seconds})

    def earlier(self, file: Path) -> list[Path]:
        """Return the same file of earlier attempts of its stage, which were moved aside.

        Its name may be a pattern, such as "*.json".
        """
        stage, *rest = file.relative_to(self.path).parts
        return sorted(self.path.glob("/".join([f"{stage}.*.old", *rest])))

    def restart_training(self) -> None:
        """Let the next training begin at step 1, also if this one has finished."""
        (self.path / "train" / "manifest.json").unlink(missing_ok=True)
        started = self.path / "train" / "started.json"
        if started.exists():
            write_json(started, {**_read_started(started), "seconds": 0.0})
        self.validation.unlink(missing_ok=True)  # a log, to which training appends
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def finish(self, stage: str, settings: str, inputs: Sequence[Input], seconds: float) -> None:
        """Write the manifest of a finished stage, whose last session took `seconds`.

        An input outside of the run may have been edited since it was read, so its hash is that of
        the start.
        """
        folder = self.path / stage
        fingerprint = _fingerprint(settings, inputs)
        started = _read_started(folder / "started.json")
        for name, item in _by_name(inputs).items():
            if not (isinstance(item, Path) and self.path in item.parents):
                # One that is new is a list of the run that has the name of a user's file.
                digest = fingerprint["inputs"][name]
                fingerprint["inputs"][name] = started["inputs"].get(name, digest)
        manifest: Manifest = {
            **fingerprint,
            "notes": self._notes.get(stage, {}),
            "seconds": round(started["seconds"] + seconds, 1),
            "versions": {package: _version(package) for package in _PACKAGES},
            "commit": _commit(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(folder / "manifest.json", manifest)


def stage_commands(stages: Sequence[str]) -> str:
    """Return the commands of some stages as a message names them: "`gatt train`, `gatt export`"."""
    return ", ".join(f"`gatt {name}`" for name in stages)


def _read_started(file: Path) -> _Started:
    """Read `started.json`; earlier versions did not write the seconds."""
    started: _Started = json.loads(file.read_text(encoding="utf-8"))
    started.setdefault("seconds", 0.0)
    return started


def _unused(folder: Path, date: str) -> Path:
    """Return the name under which a folder is moved aside, numbered within a second."""
    names = (f"{folder.name}.{date}-{n}.old" for n in count(2))
    paths = map(folder.with_name, chain([f"{folder.name}.{date}.old"], names))
    return next(path for path in paths if not path.exists())


def _fingerprint(settings: str, inputs: Sequence[Input]) -> Fingerprint:
    return {
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "inputs": {
            name: item.commit if isinstance(item, HubRevision) else sha256(item)
            for name, item in _by_name(inputs).items()
        },
        "version": _FINGERPRINT_VERSION,
    }


def _by_name(inputs: Sequence[Input]) -> dict[str, Input]:
    """Return the inputs by their names, numbered where two have the same."""
    named: dict[str, Input] = {}
    for item in inputs:
        name = item.repository if isinstance(item, HubRevision) else item.name
        # A name that is not UTF-8 cannot stand in JSON; its bytes are written as escapes.
        name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        number = 1 + sum(key == name or key.startswith(f"{name} (") for key in named)
        named[name if number == 1 else f"{name} ({number})"] = item
    return named


def _changes(
    earlier: Fingerprint, written: float, settings: str, inputs: Sequence[Input]
) -> list[str]:
    """Return what differs from a fingerprint that was written at the time `written`.

    Earlier versions did not list all inputs. One that is not listed counts as changed if it is
    newer than the fingerprint. A dataset whose commit is not known counts as unchanged.
    """
    current, items = _fingerprint(settings, inputs), _by_name(inputs)
    changed = [] if earlier["settings"] == current["settings"] else [RECIPE_CHANGE]
    lists_all = earlier.get("version") == _FINGERPRINT_VERSION
    for name, digest in current["inputs"].items():
        before = earlier["inputs"].get(name)
        if before is None:
            differs = lists_all or _newest(items[name]) > written
        else:
            differs = "" not in (before, digest) and before != digest
        changed += [name] if differs else []
    return changed + [name for name in earlier["inputs"] if name not in current["inputs"]]


def _newest(item: Input) -> float:
    """Return when a file, or the newest one in a folder, was changed, in seconds."""
    if isinstance(item, HubRevision):
        return 0.0
    files = item.rglob("*") if item.is_dir() else [item]
    return max((file.stat().st_mtime for file in files), default=0.0)


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
