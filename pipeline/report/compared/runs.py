"""Read the runs that `gatt compare` compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import GattError
from pipeline.evaluation.scores import Scores
from pipeline.export.summary import ExportSummary
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Dialogue, Reply
from pipeline.report.replies import judged_replies
from pipeline.run_dir import RunDir

EvaluationTask = tuple[Dialogue, tuple[str, ...]]
"""An evaluation dialogue with the instruction of each turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """An evaluated run.

    `settings` is its recipe by dotted keys. `replies` are those to the evaluation dialogues in
    `tasks`; their dialogue ids begin with the seed. `file_bytes` are the sizes of the exported
    files by format.
    """

    path: Path
    recipe: Recipe
    settings: Mapping[str, object]
    scores: Scores
    tasks: frozenset[EvaluationTask]
    replies: Sequence[Reply]
    file_bytes: Mapping[str, int]
    training_seconds: float | None

    def last_five(self, arm: str) -> list[Reply]:
        """Return the replies of `arm` in the last five turns."""
        first = self.scores.turns - 4
        return [reply for reply in self.replies if reply.arm == arm and reply.turn >= first]


def read_run(path: Path) -> ComparedRun:
    """Read the run in the folder `path`.

    Raises:
        GattError: the folder is not a run, was not evaluated, or lacks a file.
    """
    if not (path / "recipe.toml").is_file():
        raise GattError(
            f"{path} is not a run: it has no recipe.toml. Name folders that "
            "`gatt run --run FOLDER` has written."
        )
    run_dir = RunDir(path)
    recipe = load_recipe(path / "recipe.toml")
    if not run_dir.scores.exists():
        raise GattError(f"{path} is not evaluated yet. Run `gatt evaluate --run {path}` first.")
    for file in (run_dir.assignments, run_dir.replies):
        if not file.exists():
            raise GattError(
                f"{path} was evaluated, but {file} is missing. Copy the whole run, or run "
                f"`gatt run --run {path}` again."
            )
    dialogues = read_split(run_dir.assignments, "evaluation")
    trained = run_dir.manifest("train")
    run = ComparedRun(
        path=path,
        recipe=recipe,
        settings=dict(_dotted(recipe.model_dump(mode="json"))),
        scores=Scores.from_json(run_dir.scores.read_text(encoding="utf-8")),
        tasks=frozenset((d.dialogue, tuple(d.student_instructions)) for d in dialogues),
        replies=_checked_replies(run_dir, dialogues, recipe.seed),
        file_bytes=_file_bytes(run_dir),
        training_seconds=trained["seconds"] if trained else None,
    )
    if not run.replies and not run.scores.fidelity:
        raise GattError(
            f"{path} has no instruction with a check and no reminder fidelity: there is nothing to "
            "compare. Add checks, or evaluate two turns or more (evaluate.turns)."
        )
    if run.replies and all(reply.finish == "context" for reply in run.last_five("tuned")):
        raise GattError(
            f"{path} has no reply of a tuned model in the last five turns. Run "
            f"`gatt evaluate --run {path}` to measure one."
        )
    return run


def _file_bytes(run_dir: RunDir) -> dict[str, int]:
    if not run_dir.exported.exists():
        return {}
    summary = ExportSummary.from_json(run_dir.exported.read_text(encoding="utf-8"))
    return {name: file.bytes for name, file in summary.formats.items()}


def _checked_replies(
    run_dir: RunDir, dialogues: Sequence[AssignedDialogue], seed: int
) -> list[Reply]:
    """Return the replies to `dialogues` but those that nothing has checked."""
    return [
        replace(reply, dialogue=f"{seed}:{reply.dialogue}")
        for reply in judged_replies(run_dir, dialogues)
        if reply.obeys is not None
    ]


def _dotted(section: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of a recipe by their dotted keys."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
