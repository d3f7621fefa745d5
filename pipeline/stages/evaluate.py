"""`gatt evaluate`: measure whether the instruction of turn 1 still holds in turn 20.

Base, tuned, and base with the instruction in every turn (ceiling) answer the same dialogues. With
`--sampler` or `--turns`, base and tuned then answer them again under that condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pipeline.console import capture_output, log, print_result
from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.arms import arms, dialogue_context, files_of_user
from pipeline.evaluation.attention import attention_map
from pipeline.evaluation.conditions import Condition, measure_condition
from pipeline.evaluation.divergence import measure_degradation
from pipeline.evaluation.fidelity import measure_fidelity
from pipeline.evaluation.judge import judge
from pipeline.evaluation.replies import chat_of, generate_replies
from pipeline.files import read_jsonl, write_json
from pipeline.gatt.assign import trained_constraints
from pipeline.gatt.assignment import AssignedDialogue, check_files, read_splits
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.inference.generator import model_files
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Reply
from pipeline.report.tables import conditions_table, markdown
from pipeline.run_dir import Input, RunDir
from pipeline.system import available_memory
from pipeline.training.job import loads_in_4bit

SECTIONS = ("evaluate", "dialogues", "export")
"""Sections of the recipe that the result depends on."""
_ASSIGNED_KEYS = (
    "dialogues",
    "suite_dialogues",
    "suite_turns",
    "recall_dialogues",
    "unseen",
)
"""Keys of the evaluation by which `gatt instructions` assigns its dialogues."""
_FLOAT32_SIZE = 8
"""Memory for a map of attention, in sizes of a 4-bit file: the model in float32."""
_ATTENTION_COPIES, _HEAD_SIZE = 3, 64
"""Copies of one layer's attention weights at once; heads are at least this wide."""
_ATTENTION_TURNS = 20
"""Turns of the map: its memory grows with the square of their tokens."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Input]:
    """Return what the result depends on."""
    settings = recipe.evaluate
    tuned = [] if settings.adapter else [run_dir.tuned(name) for name in recipe.export.formats]
    judge = model_files(settings.judge) if settings.judge else []
    return [
        find_model(recipe.model).path,
        run_dir.assignments,
        run_dir.suites,
        *tuned,
        *files_of_user(settings),
        *judge,
        *check_files(run_dir.assignments),
    ]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Answer every dialogue in every arm and score it; finished replies are not generated again."""
    settings, system = recipe.evaluate, recipe.dialogues.system
    splits = read_splits(run_dir.assignments)
    trained = trained_constraints([d for d in splits["train"] if not d.is_custom])
    suites = {"evaluation": splits["evaluation"], **read_splits(run_dir.suites)}
    measured = arms(recipe, run_dir)
    note = partial(run_dir.note, "evaluate")
    logs = [*run_dir.earlier(run_dir.replies), run_dir.replies]
    replies = generate_replies(measured, suites, recipe, logs, note)
    if settings.adapter and settings.attention:
        log("evaluate: no map of attention, which is of this run's own adapter as trained.")
    elif settings.attention and not recipe.instructions.bake:
        _map_attention(recipe, run_dir, suites["evaluation"][0], replies)
    judgment = None
    if settings.judge:
        dialogues = [dialogue for suite in suites.values() for dialogue in suite]
        replies, judgment = judge(
            settings.judge, replies, dialogues, run_dir.judged, settings.max_thought_tokens, note
        )
    scores = compute_scores(replies, suites, trained)
    scores = replace(scores, primary=settings.primary, judge=judgment)
    if plain := suites.get("plain"):
        chats = [chat_of(dialogue, "base", replies, system) for dialogue in plain]
        context = dialogue_context(recipe, plain, reminded=False)
        scores = replace(scores, degradation=measure_degradation(measured, chats, context))
    fidelity = measure_fidelity(measured, suites["evaluation"], replies, recipe)
    scores = replace(scores, fidelity=fidelity)
    write_json(run_dir.scores, scores)
    _log_lost_conditions(run_dir)


def _log_lost_conditions(run_dir: RunDir) -> None:
    """Say how to measure again what an earlier evaluation has measured under other conditions."""
    moved = {file.stem for file in run_dir.earlier(run_dir.conditions / "*.json")}
    for name in sorted(moved - {file.stem for file in run_dir.conditions.glob("*.json")}):
        sampler, turns = name.rsplit("-", 1)
        log(
            f"evaluate: `gatt evaluate --run {run_dir.path} --sampler {sampler} --turns {turns}` "
            "measures again what an earlier evaluation of this run has measured."
        )


def require_assigned(recipe: Recipe, run_dir: RunDir) -> None:
    """Check that the run's dialogues are those that the settings of the evaluation ask for.

    Raises:
        GattError: they are shorter, or a setting was changed by which they were assigned.
    """
    if not run_dir.assignments.exists():
        return
    _require_same_settings(recipe, run_dir)
    dialogues = read_splits(run_dir.assignments)["evaluation"]
    longest = max((len(assigned.dialogue.turns) for assigned in dialogues), default=0)
    if longest < (turns := recipe.evaluate.turns):
        raise GattError(
            f"evaluate.turns = {turns}, but the evaluation dialogues of {run_dir.path} have "
            f"{longest} turns. `gatt evaluate --run {run_dir.path} --turns {turns}` prolongs them; "
            "`gatt run` with another --run draws longer ones, which takes new training."
        )


def _require_same_settings(recipe: Recipe, run_dir: RunDir) -> None:
    saved = load_recipe(run_dir.recipe) if run_dir.recipe.is_file() else recipe
    for key in _ASSIGNED_KEYS:
        before, after = getattr(saved.evaluate, key), getattr(recipe.evaluate, key)
        if before != after:
            raise GattError(
                f"evaluate.{key} has changed, and the dialogues of {run_dir.path} were assigned "
                "with the former value. `gatt run` with the same options assigns them again, and "
                "trains again if that changes the training dialogues."
            )


def run_condition(recipe: Recipe, run_dir: RunDir, condition: Condition) -> None:
    """Measure an evaluated run under another condition; the result stands beside the main one.

    Raises:
        GattError: as `measure_condition`, or another process works in the folder.
    """
    with run_dir.lock():
        log_file = run_dir.conditions / f"{condition.name}.jsonl"
        scores = measure_condition(
            condition,
            arms(recipe, run_dir),
            read_splits(run_dir.assignments)["evaluation"],
            [Reply(**row) for _, row in read_jsonl(run_dir.replies)],
            recipe,
            [*run_dir.earlier(log_file), log_file],
        )
        write_json(run_dir.conditions / f"{condition.name}.json", scores)
    print_result(markdown(conditions_table([scores])))
    log(f"`gatt report --run {run_dir.path}` adds this to the report.")


def _map_attention(
    recipe: Recipe, run_dir: RunDir, dialogue: AssignedDialogue, replies: Sequence[Reply]
) -> None:
    """Write what the answers of one dialogue attend to, for base and tuned, each with its own."""
    model, shape = find_model(recipe.model), shape_of(recipe.model)
    instruction = dialogue.student_instructions[0]
    replies = [
        reply
        for reply in replies
        if reply.dialogue == dialogue.dialogue.id and reply.turn <= _ATTENTION_TURNS
    ]
    tokens = max((reply.prompt_tokens + reply.tokens for reply in replies), default=0)
    scores = _ATTENTION_COPIES * 4 * tokens**2 * shape.q_size // _HEAD_SIZE
    if _FLOAT32_SIZE * model.bytes + scores > available_memory():
        log(
            "evaluate: too little memory for the model in float32 and its attention over "
            f"{tokens} tokens; no map of it."
        )
        return
    with capture_output(run_dir.attention.with_name("transformers.log")):
        folder = cached_checkpoint(model)
        maps = {
            arm: attention_map(
                folder,
                adapter,
                chat_of(dialogue, arm, replies, recipe.dialogues.system),
                instruction,
                in_4bit=loads_in_4bit(recipe.train, shape),
            )
            for arm, adapter in (("base", None), ("tuned", run_dir.adapter))
        }
    write_json(run_dir.attention, maps)
