"""What a run was made with: its models, settings, versions and times."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.instruction_files import read_instructions
from pipeline.gatt.instructions import instruction_of
from pipeline.recipe import Evaluate, Instructions, PoolEntry, Recipe
from pipeline.records import CustomInstruction
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


def chat_options(recipe: Recipe) -> list[str]:
    """Return the options of `gatt chat` that give the first instruction as training does.

    With a baked prompt there are none.
    """
    if recipe.instructions.bake:
        return []
    system, options = recipe.dialogues.system, []
    if entry := _first_instruction(recipe.instructions):
        text = instruction_of(entry).text
        if isinstance(entry, CustomInstruction) and entry.place == "system":
            system = f"{system} {text}".strip()
        else:
            options = ["--instruction", text]
    return ["--system", system, *options] if system else options


def _first_instruction(settings: Instructions) -> PoolEntry | None:
    """Return the first instruction of the file, if it is still there, or of the pool."""
    file = Path(settings.file).expanduser()
    listed = read_instructions(file) if settings.file and file.exists() else []
    return next(iter([*listed, *settings.pool]), None)


def file_facts(recipe: Recipe, run_dir: RunDir) -> dict[str, str]:
    """Return the hashes of every stage's inputs, and the sizes of the exported files."""
    facts: dict[str, str] = {}
    for stage in STAGES[:-1]:
        if manifest := run_dir.manifest(stage):
            for name, digest in manifest["inputs"].items():
                kind = "commit" if len(digest) == _COMMIT_LENGTH else "sha256"
                key, short = f"{kind} of {Path(name).name}", digest[:16] or "not known"
                # Files of one name: a user's dialogues.jsonl, and that of the run.
                is_other = facts.get(key, short) != short
                facts[f"{key} ({stage})" if is_other else key] = short
    for format_name in recipe.export.formats:
        file = run_dir.tuned(format_name)
        if file.is_file():
            facts[file.name] = f"{file.stat().st_size / 1e6:.0f} MB"
    return facts


def shortened_warning(settings: Evaluate, dialogues: int) -> str:
    """Return a warning for a run that measured less than the defaults, else "".

    `dialogues` is the number that was measured.
    """
    measured = settings.model_copy(update={"dialogues": dialogues})
    if not measured.shortened:
        return ""
    return (
        f"A shortened run: {dialogues} dialogues of {settings.turns} turns. "
        "Do not cite its figures."
    )
