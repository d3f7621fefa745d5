"""`gatt instructions`: assign an instruction to each dialogue, for training and for evaluation."""

from __future__ import annotations

from pathlib import Path

import tomlkit

from pipeline.console import log
from pipeline.data.sources import source_inputs
from pipeline.data.splits import DialogueSplits, split_dialogues
from pipeline.errors import GattError
from pipeline.evaluation.suites import SuiteSettings, build_suites
from pipeline.files import write_text
from pipeline.gatt.assign import (
    ConstraintPool,
    Ratios,
    assign_evaluation,
    assign_training,
    trained_constraints,
)
from pipeline.gatt.assignment import AssignedDialogue, write_splits
from pipeline.gatt.constraints.registry import kind_of
from pipeline.gatt.generated_values import LISTS, list_values
from pipeline.hub.models import find_model, require_exportable
from pipeline.inference.generator import GenerationEngine
from pipeline.inference.teacher import open_teacher
from pipeline.recipe import Evaluate, Recipe
from pipeline.recipe_file import read_toml
from pipeline.records import Constraint
from pipeline.run_dir import Input, RunDir

SECTIONS = ("dialogues", "instructions", "synthesize", "evaluate")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Input]:
    """Return what the result depends on."""
    generated = [run_dir.lists] if run_dir.lists.exists() else []
    dialogues = source_inputs(recipe.dialogues.source)
    return [find_model(recipe.model).path, *generated, *dialogues]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Split the dialogues, assign instructions, and write both as `assignments.json`.

    The dialogues of the further evaluation suites go to `suites.json`, so that a change there
    does not require new training.

    Raises:
        GattError: the model cannot be exported, there are too few dialogues for separate splits,
            or the pool is empty or needs a judge.
    """
    require_exportable(find_model(recipe.model))  # fails here, not after the training
    dialogues = split_dialogues(recipe)
    constraints = (*recipe.instructions.pool, *_generated_constraints(recipe, run_dir))
    pool = ConstraintPool(constraints, recipe.instructions.vocabulary_kinds)
    check_pool(pool, recipe.evaluate)
    training = write_assignments(recipe, run_dir, dialogues, pool)
    settings = recipe.evaluate
    suites = SuiteSettings(
        pool=pool,
        trained=trained_constraints(training),
        unseen=settings.unseen,
        turns=min(settings.suite_turns, settings.turns),
        full_turns=settings.turns,
        seed=recipe.seed,
    )
    held_out = dialogues.evaluation[: settings.suite_dialogues]
    write_splits(run_dir.suites, build_suites(held_out, suites))


def check_pool(pool: ConstraintPool, evaluate: Evaluate) -> None:
    """Check that there are constraints, and that something can tell whether they are met.

    Raises:
        GattError: an empty pool, or a constraint that needs a judge where there is none.
    """
    for constraint in (*pool.constraints, *evaluate.unseen):
        if kind_of(constraint).judged and not evaluate.judge:
            raise GattError(
                f"No program can check {constraint.name!r}. Name a model or a server as the judge "
                "in evaluate.judge."
            )
    if not any(pool):
        raise GattError(
            "instructions.pool and instructions.vocabulary_kinds are empty. Name at least one "
            'constraint in the pool, for example {kind = "opening", value = "Ahoy!"}.'
        )


def write_assignments(
    recipe: Recipe, run_dir: RunDir, dialogues: DialogueSplits, pool: ConstraintPool
) -> list[AssignedDialogue]:
    """Write `assignments.json` and return the training dialogues.

    Validation and evaluation use constraints of training, validation those that a program checks.
    """
    settings = recipe.instructions
    ratios = Ratios(
        plain=settings.plain_ratio,
        recall=settings.recall_ratio,
        combine=settings.combine_ratio,
        short=settings.short_ratio,
        system=settings.system_ratio,
        contradict=settings.contradict_ratio,
        change=settings.change_ratio,
        stop=settings.stop_ratio,
        edited=recipe.synthesize.edited_ratio,
    )
    training = assign_training(dialogues.training, pool, ratios, recipe.seed)
    trained = trained_constraints(training)
    checkable = [c for c in trained if not kind_of(c).judged]
    splits = {
        "train": training,
        "validation": assign_evaluation(dialogues.validation, checkable),
        "evaluation": assign_evaluation(dialogues.evaluation, trained),
    }
    write_splits(run_dir.assignments, splits)
    log(
        f"instructions: {len(training)} training dialogues, {len(dialogues.evaluation)} for "
        f"evaluation, {_count_instructions(training)} instructions"
    )
    return training


def _count_instructions(dialogues: list[AssignedDialogue]) -> int:
    instructions = {i for a in dialogues for i in (a.instruction, a.next_instruction) if i}
    return len(instructions)


def _generated_constraints(recipe: Recipe, run_dir: RunDir) -> list[Constraint]:
    """Return the values in `lists.toml`, after the teacher has listed the kinds that are missing.

    Raises:
        GattError: an edited list has a value that its kind does not take.
    """
    settings = recipe.instructions
    lists: dict[str, list[str]] = {}
    if run_dir.lists.exists():
        lists = _checked_lists(run_dir.lists)
    missing = [kind for kind in settings.generate if kind not in lists]
    if missing:
        with open_teacher(recipe, LISTS) as teacher:
            for kind in missing:
                lists[kind] = _known_values(kind, teacher, settings.generate_count, recipe.seed)
        run_dir.note("instructions", teacher.name, teacher.changes)
        comment = "# Edit these lists if you like; the next run uses them.\n"
        write_text(run_dir.lists, comment + tomlkit.dumps(lists))
    constraints = [Constraint(kind, value) for kind in settings.generate for value in lists[kind]]
    for constraint in constraints:
        kind_of(constraint)
    return constraints


def _checked_lists(file: Path) -> dict[str, list[str]]:
    lists = read_toml(file)
    for kind, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise GattError(
                f"{file}: {kind} = {values!r}; expected a list of texts. Correct it, or delete "
                "the file to have it made again."
            )
    return lists


def _known_values(kind: str, teacher: GenerationEngine, count: int, seed: int) -> list[str]:
    """Return up to `count` values that the teacher lists and knows."""
    listed = list_values(kind, teacher.run, seed)
    values = listed.known[:count]
    log(
        f"instructions: {kind}: {listed.candidates} listed, {len(listed.known)} of them known to "
        f"the teacher: {', '.join(values)}"
    )
    if not values:
        raise GattError(
            f"The teacher knows none of the values that it listed for {kind!r}. Choose a larger "
            "teacher, or name values in instructions.pool."
        )
    return values
