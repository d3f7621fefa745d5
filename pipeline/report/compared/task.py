"""Whether runs were evaluated on the same task, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.gatt.constraints.registry import is_judged
from pipeline.report.compared.runs import ComparedRun, EvaluationTask

_TASK_SETTINGS = (
    "evaluate.dialogues",
    "evaluate.turns",
    "evaluate.max_tokens",
    "evaluate.temperature",
    "dialogues.system",
    "dialogues.source",
    "instructions.pool",
    "instructions.file",
    "instructions.bake",
)
"""Settings that must be equal, like the dialogues, for a difference to mean something."""
_SUITE_SETTINGS = (
    "evaluate.suite_dialogues",
    "evaluate.suite_turns",
    "evaluate.recall_dialogues",
)
"""Settings of the further suites; adherence to trained instructions does not depend on them."""


def differing_settings(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the dotted keys of the recipe, other than the seed, that differ between runs."""
    return [
        key
        for key in runs[0].settings
        if key != "seed" and len({repr(run.settings[key]) for run in runs}) > 1
    ]


def task_warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Return why the runs were not evaluated on the same task; then no differences are computed."""
    warnings = [
        f"{key} differs between the runs: they were not evaluated on the same task."
        for key in _TASK_SETTINGS
        if len({repr(run.settings[key]) for run in runs}) > 1
    ]
    instructions = runs[0].recipe.instructions
    needs_judge = bool(instructions.file or instructions.bake)
    needs_judge |= is_judged(instructions.constraints)
    needs_judge |= any(not c.checks or is_judged(c.checks) for c in instructions.custom)
    if needs_judge and len({run.recipe.evaluate.judge for run in runs}) > 1:
        warnings.append("The runs were judged by different models.")
    tasks_by_seed: dict[int, set[frozenset[EvaluationTask]]] = {}
    for run in runs:
        tasks_by_seed.setdefault(run.recipe.seed, set()).add(run.tasks)
    if any(len(tasks) > 1 for tasks in tasks_by_seed.values()):
        warnings.append("The runs were evaluated on different dialogues or instructions.")
    if warnings:
        warnings.append("No differences between the runs are computed.")
    return warnings


def suite_warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Return a warning for each setting that gives the further suites other dialogues."""
    return [
        f"{key} differs between the runs: recall, leakage and perplexity are over different "
        "dialogues."
        for key in _SUITE_SETTINGS
        if len({run.settings[key] for run in runs}) > 1
    ]
