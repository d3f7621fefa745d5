"""Read the results of a run that its report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pipeline.evaluation.rates import Rate, wilson
from pipeline.evaluation.scores import ConditionScores, Scores
from pipeline.export.summary import ExportSummary
from pipeline.files import read_json, read_jsonl, sha256
from pipeline.gatt.acceptance import Acceptance
from pipeline.gatt.assignment import read_split
from pipeline.recipe import Recipe
from pipeline.report.facts import file_facts, public_name, run_facts, shortened_warning
from pipeline.report.page import ComparedDialogue, ComparedTurn
from pipeline.report.replies import judged_replies
from pipeline.run_dir import RunDir, stage_commands

if TYPE_CHECKING:
    from pipeline.evaluation.attention import AttentionMap

_MAX_PLOTTED = 4
"""Arms in a figure, in addition to base, tuned and ceiling."""
_COMPARED_DIALOGUES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What training has computed in `seconds`: learned tokens, all tokens, and padding."""

    learned: int
    computed: int
    padding: int
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResults:
    """Everything that a report shows; what was not measured is empty or None.

    `measured_dialogues` is the number of evaluation dialogues. `measured_formats` are those of the
    exported files whose present content was evaluated. `validation` has adherence by training step,
    `attention` a map for base and one for tuned. The recipe has changed since
    the `outdated` stages.
    """

    recipe: Recipe
    scores: Scores
    export: ExportSummary
    facts: Mapping[str, str]
    measured_dialogues: int
    measured_formats: Sequence[str]
    acceptance: Acceptance | None = None
    losses: Sequence[float] = ()
    validation: Mapping[int, Rate] = field(default_factory=dict)
    throughput: Throughput | None = None
    attention: Mapping[str, AttentionMap] = field(default_factory=dict)
    dialogues: Sequence[ComparedDialogue] = ()
    conditions: Sequence[ConditionScores] = ()
    outdated: Sequence[str] = ()

    @property
    def arms(self) -> list[str]:
        """Return all measured models."""
        return list(self.scores.replies)

    @property
    def subject(self) -> str:
        """Return which model was trained, who taught it, and how many answers were edited."""
        line = f"Model: {self.facts['base model']}. Teacher: {self.facts['teacher']}."
        counts = self.acceptance
        if counts and counts.answers and counts.edited is not None:
            line += f" Edited answers in the training data: {counts.edited} of {counts.answers}."
        settings = self.recipe.evaluate
        if settings.adapter:
            line += (
                f" Measured as tuned: the base with the adapter {public_name(settings.adapter)} at "
                f"scale {settings.adapter_scale:g}, not an exported file."
            )
        return line

    @property
    def warning(self) -> str:
        """Return why the figures are not to be cited, or are not those of file or recipe."""
        warnings = [shortened_warning(self.recipe.evaluate, self.measured_dialogues)]
        if self.outdated:
            stages = stage_commands(self.outdated)
            warnings.append(
                f"The recipe has changed since {stages}, so the settings shown may not be those of "
                "the figures. `gatt run` brings the run up to date."
            )
        if not (self.measured_formats or self.recipe.evaluate.adapter):
            warnings.append(
                "The exported file is not the one that was measured. `gatt evaluate` measures it."
            )
        return " ".join(filter(None, warnings))

    @property
    def plotted_arms(self) -> list[str]:
        """Return the arms that figures have room for."""
        further = [arm for arm in self.arms if arm not in ("base", "tuned", "ceiling")]
        return [arm for arm in self.arms if arm not in further[_MAX_PLOTTED:]]


def read_results(recipe: Recipe, run_dir: RunDir) -> RunResults:
    """Read the files of a run.

    Raises:
        GattError: a file was written by another version.
    """
    _, example = next(read_jsonl(run_dir.examples))
    return RunResults(
        recipe=recipe,
        measured_dialogues=len(read_split(run_dir.assignments, "evaluation")),
        measured_formats=_measured_formats(recipe, run_dir),
        scores=Scores.from_json(run_dir.scores.read_text(encoding="utf-8")),
        export=ExportSummary.from_json(run_dir.exported.read_text(encoding="utf-8")),
        facts=run_facts(recipe, run_dir, example["teacher"]) | file_facts(recipe, run_dir),
        acceptance=_read_acceptance(run_dir),
        losses=_read_losses(run_dir),
        validation=_read_validation(run_dir),
        throughput=_read_throughput(run_dir),
        attention=_read_attention(run_dir),
        dialogues=_read_dialogues(run_dir),
        conditions=_read_conditions(run_dir),
        outdated=run_dir.outdated,
    )


def _measured_formats(recipe: Recipe, run_dir: RunDir) -> list[str]:
    """Return the formats whose files have the content that was evaluated.

    It is not known while an evaluation is unfinished.
    """
    manifest = run_dir.manifest("evaluate")
    if manifest is None:
        return list(recipe.export.formats)
    hashes = manifest["inputs"].values()
    files = {name: run_dir.tuned(name) for name in recipe.export.formats}
    return [name for name, file in files.items() if file.is_file() and sha256(file) in hashes]


def _read_losses(run_dir: RunDir) -> list[float]:
    """Return the loss by training step; empty where training has not logged it."""
    if not run_dir.losses.exists():
        return []
    return TypeAdapter(list[float]).validate_json(run_dir.losses.read_bytes())


def _read_acceptance(run_dir: RunDir) -> Acceptance | None:
    if not run_dir.acceptance.exists():
        return None
    return read_json(run_dir.acceptance, Acceptance, "synthesize")


def _read_validation(run_dir: RunDir) -> dict[int, Rate]:
    if not run_dir.validation.exists():
        return {}
    # A resumed run measures a step again: the later row replaces the earlier one.
    rows = {row["step"]: row for _, row in read_jsonl(run_dir.validation)}
    return {step: wilson(row["adherent"], row["answers"]) for step, row in sorted(rows.items())}


def _read_throughput(run_dir: RunDir) -> Throughput | None:
    if not run_dir.speed.exists():
        return None
    return TypeAdapter(Throughput).validate_json(run_dir.speed.read_bytes())


def _read_attention(run_dir: RunDir) -> dict[str, AttentionMap]:
    from pipeline.evaluation.attention import read_attention_maps

    if not run_dir.attention.exists():
        return {}
    return read_attention_maps(run_dir.attention.read_text(encoding="utf-8"))


def _read_conditions(run_dir: RunDir) -> list[ConditionScores]:
    files = sorted(run_dir.conditions.glob("*.json"))
    return [read_json(file, ConditionScores, "evaluate") for file in files]


def _read_dialogues(run_dir: RunDir) -> list[ComparedDialogue]:
    """Return the first dialogues as far as both base and tuned have replied."""
    dialogues = read_split(run_dir.assignments, "evaluation")[:_COMPARED_DIALOGUES]
    replies = {(r.arm, r.dialogue, r.turn): r for r in judged_replies(run_dir, dialogues)}
    compared = []
    for assigned in dialogues:
        dialogue = assigned.dialogue
        turns = [
            ComparedTurn(
                turn,
                user,
                (replies["base", dialogue.id, turn], replies["tuned", dialogue.id, turn]),
            )
            for turn, user in enumerate(dialogue.turns, 1)
            if ("tuned", dialogue.id, turn) in replies
        ]
        compared.append(ComparedDialogue(assigned.student_instructions[0], turns))
    return compared
