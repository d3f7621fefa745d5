"""What a run was made with: its models, settings, versions and times."""

from __future__ import annotations

from pathlib import Path

from pipeline.recipe import Evaluate, Recipe
from pipeline.run_dir import STAGES, RunDir

_COMMIT_LENGTH = 40
"""Characters of the commit of a dataset; a SHA-256 has more."""


def public_name(model: str) -> str:
    """Return the name of a model; of a path on this machine only its last part."""
    return Path(model).name if Path(model).exists() else model


def run_facts(recipe: Recipe, run_dir: RunDir, teacher: str) -> dict[str, str]:
    """Return what a reader needs to repeat the run, by name."""
    train = recipe.train
    facts = {
        "base model": public_name(recipe.model),
        "teacher": public_name(teacher),
        "seed": str(recipe.seed),
        "training": (
            f"loss {train.loss}, {train.max_steps} steps of {train.batch_size} dialogues, "
            f"rank {train.rank}"
        ),
    }
    for stage in STAGES[:-1]:
        if manifest := run_dir.manifest(stage):
            facts[f"time of {stage}"] = f"{manifest['seconds']:.0f} s"
            facts["versions"] = ", ".join(
                f"{package} {version}"
                for package, version in manifest["versions"].items()
                if version != "none"
            )
            facts["commit of gatt"] = manifest["commit"]
            facts["machine"] = manifest["platform"]
    return facts


def file_facts(recipe: Recipe, run_dir: RunDir) -> dict[str, str]:
    """Return the hashes of every stage's inputs, and the sizes of the exported files."""
    facts = {}
    for stage in STAGES[:-1]:
        if manifest := run_dir.manifest(stage):
            for name, digest in manifest["inputs"].items():
                kind = "commit" if len(digest) == _COMMIT_LENGTH else "sha256"
                facts[f"{kind} of {Path(name).name}"] = digest[:16] or "not known"
    for format_name in recipe.export.formats:
        file = run_dir.tuned(format_name)
        facts[file.name] = f"{file.stat().st_size / 1e6:.0f} MB"
    return facts


def shortened_warning(settings: Evaluate) -> str:
    """Return a warning for a run that measured less than the defaults, else ""."""
    if not settings.shortened:
        return ""
    return (
        f"A shortened run: {settings.dialogues} dialogues of {settings.turns} turns. "
        "Do not cite its figures."
    )
