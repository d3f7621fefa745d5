"""`gatt instructions`: assign an instruction to each dialogue, for training and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from pipeline.console import log, print_table
from pipeline.custom_instructions import with_distinct_names
from pipeline.data.instruction_files import count_skipped, read_instructions
from pipeline.data.prompts import read_prompt
from pipeline.data.sources import source_inputs
from pipeline.data.splits import DialogueSplits, split_dialogues
from pipeline.errors import GattError
from pipeline.evaluation.arms import files_of_user
from pipeline.evaluation.suites import SuiteSettings, build_baked_suites, build_suites
from pipeline.export.merged import require_merge_base
from pipeline.export.tokens import check_tokens
from pipeline.gatt.assign import (
    ConstraintPool,
    Ratios,
    assign_evaluation,
    assign_training,
    trained_constraints,
    untrained_entries,
)
from pipeline.gatt.assignment import AssignedDialogue, write_splits
from pipeline.gatt.bake import assign_baked, baked_instruction, with_prompt
from pipeline.gatt.constraints.custom_checks import function_files
from pipeline.gatt.constraints.registry import KINDS, is_judged, kind_of
from pipeline.gatt.instructions import custom_instruction, prepare_checks
from pipeline.gguf.formats import require_formats
from pipeline.hub.models import Model, find_model, require_exportable, shape_of
from pipeline.inference.chat_template import template_in
from pipeline.inference.generator import model_files
from pipeline.inference.teacher import (
    generated_constraints,
    require_short_instructions,
    require_short_prompt,
)
from pipeline.inference.thoughts import always_thinks
from pipeline.recipe import Evaluate, Recipe
from pipeline.records import Constraint, CustomInstruction, Dialogue
from pipeline.run_dir import Input, RunDir
from pipeline.training.job import check_init_adapter, loads_in_4bit, require_reporters
from pipeline.training.projections import require_projections
from pipeline.training.validation import require_validation

_TAKEN_NAMES = (*KINDS, "none", "stop")
"""Names that tables use for something else than an instruction in the user's own words."""
SECTIONS = ("dialogues", "instructions", "synthesize", "evaluate")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Input]:
    """Return what the result depends on."""
    generated = [run_dir.lists] if run_dir.lists.exists() else []
    dialogues = source_inputs(recipe.dialogues.source)
    return [find_model(recipe.model).path, *generated, *dialogues, *_custom_inputs(recipe)]


def _custom_inputs(recipe: Recipe) -> list[Input]:
    """Return the files of instructions, and of functions that check whether answers follow them.

    Reading a missing file is an error that says more.
    """
    settings = recipe.instructions
    files = (Path(name).expanduser() for name in (settings.file, settings.bake) if name)
    custom = () if settings.bake else _custom_instructions(recipe)
    checks = (check for instruction in custom for check in instruction.checks)
    return [*(file for file in files if file.exists()), *function_files(checks)]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Split the dialogues, assign instructions, and write both as `assignments.json`.

    The dialogues of the further evaluation suites go to `suites.json`, so that a change there
    does not require new training.

    Raises:
        GattError: the model cannot be exported, or not in these formats, there are too few
            dialogues for separate splits, or the pool is empty or needs a judge.
    """
    require_formats(recipe.export.formats)
    model = find_model(recipe.model)
    require_exportable(model)  # fails here, not after the training
    require_projections(model, recipe.train)
    in_4bit = loads_in_4bit(recipe.train, shape_of(recipe.model))
    require_merge_base(model, recipe.export, in_4bit=in_4bit)
    _require_files(recipe, model)
    if recipe.export.verify_tokenizer:
        check_tokens(model)
    _log_thinking(model)
    if recipe.instructions.bake:
        _assign_prompt(recipe, run_dir)
        return
    custom, listed = _custom_instructions(recipe), recipe.instructions
    if recipe.dialogues.system and any(c.place == "system" for c in custom):
        log(
            "instructions: in the system message, your own words stand after dialogues.system, "
            f'"{recipe.dialogues.system}" Give the model both later, or set it to "".'
        )
    if listed.file and (skipped := count_skipped(Path(listed.file))):
        log(f"instructions: {skipped} entries of {listed.file} are not read: not *.txt or *.md.")
    pool = ConstraintPool(
        listed.constraints, listed.vocabulary_kinds, custom, listed.vocabulary_ratio
    )
    check_pool(pool, recipe.evaluate)
    require_short_instructions(custom, recipe)
    dialogues = split_dialogues(recipe)
    constraints = (*pool.constraints, *generated_constraints(recipe, run_dir, dialogues.training))
    pool = pool._replace(constraints=constraints)
    require_instruction(pool)
    training = write_assignments(recipe, run_dir, dialogues, pool)
    settings = recipe.evaluate
    suites = SuiteSettings(
        pool=pool,
        trained=trained_constraints([d for d in training if not d.is_custom]),
        unseen=settings.unseen,
        turns=min(settings.suite_turns, settings.turns),
        full_turns=settings.turns,
        seed=recipe.seed,
        custom=_given(custom, training),
    )
    held_out = dialogues.evaluation[: settings.suite_dialogues]
    further = dialogues.evaluation[settings.suite_dialogues :]
    recall = _recall_dialogues(dialogues, settings)
    write_splits(run_dir.suites, build_suites(held_out, suites, recall, further))


def _require_files(recipe: Recipe, model: Model) -> None:
    """Check that what later stages need is there: models to compare with, judges, an adapter.

    Raises:
        GattError: a file is missing or in another form, there is no such model, training cannot
            start from the adapter, or a package is not installed.
    """
    files_of_user(recipe.evaluate)
    require_reporters(recipe.train)
    for judge in {recipe.evaluate.judge, recipe.synthesize.judge} - {""}:
        model_files(judge)
    if recipe.train.init_adapter:
        check_init_adapter(recipe.train, template_in(model).source)


def _log_thinking(model: Model) -> None:
    """Say so if a base thinks before every answer, which no training changes."""
    if always_thinks(template_in(model)):
        log(
            f"{model.name}: its chat template opens a thought before every answer, and cannot "
            "switch that off. It is trained without thoughts and still thinks afterwards: give it "
            "room by evaluate.max_thought_tokens. What it thinks is cut off and not scored."
        )


def _recall_dialogues(dialogues: DialogueSplits, settings: Evaluate) -> list[Dialogue]:
    """Return the dialogues that ask for attributes; they repeat where there are too few."""
    held_out = dialogues.evaluation
    if settings.recall_dialogues:
        return list(islice(cycle(held_out), settings.recall_dialogues))
    return held_out[: settings.suite_dialogues]


def _assign_prompt(recipe: Recipe, run_dir: RunDir) -> None:
    """Write the assignments that bake a prompt into the model.

    Raises:
        GattError: there is no prompt in the file, it is longer than the model's context, or no
            program can check it and training is to stop early.
    """
    file = Path(recipe.instructions.bake).expanduser()
    prompt = read_prompt(file)
    require_short_prompt(prompt.text, file, recipe)
    dialogues, settings = split_dialogues(recipe), recipe.instructions
    instruction = baked_instruction(prompt.text)
    is_checked = bool(instruction.constraints)
    validation = [with_prompt(d, instruction) for d in dialogues.validation if is_checked]
    require_validation(recipe, validation)
    training = assign_baked(
        dialogues.training,
        instruction,
        identity_ratio=settings.recall_ratio,
        # Without another system message, a plain dialogue would look like a baked one.
        plain_ratio=settings.plain_ratio if recipe.dialogues.system else 0.0,
        seed=recipe.seed,
    )
    splits = {
        "train": training,
        "validation": validation,
        "evaluation": [with_prompt(d, instruction) for d in dialogues.evaluation],
    }
    write_splits(run_dir.assignments, splits)
    held_out = dialogues.evaluation[: recipe.evaluate.suite_dialogues]
    recalled = baked_instruction(prompt.text, prompt.name) if prompt.name else None
    suites = build_baked_suites(
        held_out,
        recalled,
        _recall_dialogues(dialogues, recipe.evaluate),
        turns=min(recipe.evaluate.suite_turns, recipe.evaluate.turns),
        full_turns=recipe.evaluate.turns,
        plain=bool(recipe.dialogues.system),
    )
    write_splits(run_dir.suites, suites)
    log(
        f"instructions: {len(training)} training dialogues with the prompt {file.name}, "
        f"{len(dialogues.evaluation)} for evaluation"
    )
    if is_checked:
        names = "; ".join(constraint.name for constraint in instruction.constraints)
        log(f"instructions: checks of answers, derived from the prompt: {names}")
    else:
        log(
            "instructions: no sentence of the prompt is worded as a check, so answers are not "
            "checked. `gatt instructions --kinds` lists the wordings."
        )


def check_pool(pool: ConstraintPool, evaluate: Evaluate) -> None:
    """Check that what is named can tell whether the instructions are met.

    Raises:
        GattError: a check that cannot be used, or a constraint that needs a judge where there is
            none.
    """
    prepare_checks(pool.custom)
    constraints = (*pool.constraints, *evaluate.unseen)
    for constraint in constraints:
        if not kind_of(constraint).wordings:
            raise GattError(
                f"{constraint.name!r} is a check, and no instruction. Write what the model shall "
                f'do, too: {{text = "...", checks = [{{{constraint.kind} = "..."}}]}}.'
            )
    for constraint in (*constraints, *(check for c in pool.custom for check in c.checks)):
        if kind_of(constraint).judged and not evaluate.judge:
            raise GattError(
                f"No program can check {constraint.name!r}. Name a model or a server as the judge "
                "in evaluate.judge."
            )


def require_instruction(pool: ConstraintPool) -> None:
    """Raise a `GattError` if nothing can be drawn from the pool."""
    if not (pool.listed or pool.vocabulary_kinds):
        raise GattError(
            "instructions.pool and instructions.vocabulary_kinds are empty, and no values are "
            "generated. Name at least one constraint in the pool, for example "
            '{kind = "opening", value = "Ahoy!"}.'
        )


def write_assignments(
    recipe: Recipe, run_dir: RunDir, dialogues: DialogueSplits, pool: ConstraintPool
) -> list[AssignedDialogue]:
    """Write `assignments.json` and return the training dialogues.

    Validation and evaluation use constraints of training, validation those that a program checks.
    Where training has none, as with recall alone, evaluation uses those of the pool.
    """
    training = assign_training(dialogues.training, pool, _ratios(recipe), recipe.seed)
    trained = trained_constraints([d for d in training if not d.is_custom])
    custom = _given(pool.custom, training)
    measured = (trained, custom)
    if not (trained or custom):
        measured = untrained_entries(pool, len(dialogues.evaluation), recipe.seed)
        log(
            "instructions: no training dialogue has an instruction that answers have to follow. "
            "Evaluation measures instructions of the pool, which are not trained."
        )
    checkable = [c for c in trained if not kind_of(c).judged]
    checkable_custom = [c for c in custom if c.checks and not is_judged(c.checks)]
    validation = assign_evaluation(dialogues.validation, checkable, checkable_custom)
    validation = validation[: len(dialogues.validation)]
    require_validation(recipe, validation)
    splits = {
        "train": training,
        "validation": validation,
        "evaluation": assign_evaluation(dialogues.evaluation, *measured),
    }
    write_splits(run_dir.assignments, splits)
    log(
        f"instructions: {len(training)} training dialogues, {len(splits['evaluation'])} for "
        f"evaluation, {_count_instructions(training)} instructions"
    )
    _show_custom(pool.custom, training)
    return training


def _ratios(recipe: Recipe) -> Ratios:
    settings = recipe.instructions
    return Ratios(
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


def _given(
    custom: Sequence[CustomInstruction], training: Sequence[AssignedDialogue]
) -> list[CustomInstruction]:
    """Return the instructions that a training dialogue has."""
    given = {assigned.instruction for assigned in training}
    return [c for c in custom if custom_instruction(c) in given]


def _custom_instructions(recipe: Recipe) -> tuple[CustomInstruction, ...]:
    """Return the different instructions in the user's own words, of the pool and of the file."""
    settings = recipe.instructions
    listed = read_instructions(Path(settings.file)) if settings.file else []
    return with_distinct_names([*settings.custom, *listed], _TAKEN_NAMES)


def _show_custom(custom: Sequence[CustomInstruction], training: Sequence[AssignedDialogue]) -> None:
    """Print each instruction in the user's own words, what checks it, and its dialogues."""
    if not custom:
        return
    given = Counter(assigned.instruction for assigned in training)
    counts = [given[custom_instruction(c)] for c in custom]
    rows = [
        (c.name, c.place, "; ".join(map(_check_name, c.checks)) or "none", dialogues)
        for c, dialogues in zip(custom, counts, strict=True)
    ]
    print_table(("instruction", "place", "checks", "dialogues"), rows)
    if missing := counts.count(0):
        log(
            f"instructions: {missing} of these have no training dialogue and are not measured. "
            f"Raise dialogues.train to {len(custom)} or more."
        )


def _check_name(check: Constraint) -> str:
    """Return a check for a table, of a function's file only the last part."""
    value = Path(check.value).name if check.kind == "function" else check.value
    return Constraint(check.kind, value).name


def _count_instructions(dialogues: list[AssignedDialogue]) -> int:
    instructions = {i for a in dialogues for i in (a.instruction, a.next_instruction) if i}
    return len(instructions)
