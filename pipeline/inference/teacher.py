"""The teacher: the model or server whose answers, and lists of values, become training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tomlkit

from pipeline.console import Progress, log, progress
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.files import write_json, write_text
from pipeline.folders import lock_file
from pipeline.gatt.constraints.language import language_of
from pipeline.gatt.constraints.registry import kind_of
from pipeline.gatt.generated_values import LISTS, list_values
from pipeline.gatt.quality import find_defect
from pipeline.gatt.text import first_sentences, has_sentences
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.hub.convert import cached_gguf, runnable_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import GenerationEngine, context_for, open_generator
from pipeline.inference.llama.model import LoadedModel
from pipeline.inference.remote.address import is_server_url
from pipeline.recipe import Recipe
from pipeline.recipe_file import read_toml
from pipeline.records import Constraint, CustomInstruction, Dialogue, Message, Request, Task
from pipeline.run_dir import RunDir

_USER_TOKENS = 100
"""Tokens of a user message of the teacher's: the instruction stands in every one of them."""
_SHORT_TURN_TOKENS = 100
"""Tokens of a short question and its answer, with the template's markers."""


def open_teacher(recipe: Recipe, dialogues: int, further_tokens: int = 0) -> GenerationEngine:
    """Open the teacher that the recipe names, for up to `dialogues` dialogues.

    A dialogue may be longer than usual by `further_tokens`.

    Where a local teacher is converted to another format, what that costs in quality is logged.

    Raises:
        GattError: no such model, not a valid address, or too little memory.
    """
    settings = recipe.synthesize
    name, format_name = settings.teacher or recipe.model, ""
    if not is_server_url(name):
        model = find_model(name)
        format_name = settings.format or ("" if model.is_gguf else "F16")
        if format_name:
            _log_conversion_quality(model, format_name)
    return open_generator(
        name,
        dialogues=dialogues,
        context=context_for(recipe.dialogues.turns, settings.max_tokens, _USER_TOKENS)
        + further_tokens,
        format_name=format_name,
        max_parallel=settings.max_parallel,
        max_thought_tokens=settings.max_thought_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Quality:
    """Perplexity on user turns, and the fraction of first answers without a defect."""

    perplexity: float
    accepted: float

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} and {self.accepted:.0%}"


def require_short_prompt(text: str, file: Path, recipe: Recipe) -> None:
    """Raise a `GattError` if prompt, question and answer exceed the model's context."""
    model = find_model(recipe.model)
    tokens = _count_tokens(text, model, recipe)
    room = _open_student(model, recipe).context_length - context_for(
        1, recipe.synthesize.max_tokens
    )
    if tokens > room:
        raise GattError(
            f"The prompt {file} has {tokens} tokens; the context of {model.name} has room for "
            f"{max(0, room)} of them. Shorten it, or choose a model with a longer context."
        )


def require_short_instructions(custom: Sequence[CustomInstruction], recipe: Recipe) -> None:
    """Raise a `GattError` if one of them, a question and an answer exceed `train.max_length`."""
    limit = recipe.train.max_length
    room = limit - _SHORT_TURN_TOKENS
    for instruction in custom:
        if len(instruction.text.encode()) <= room:  # a token has at least a byte
            continue
        tokens = _count_tokens(instruction.text, find_model(recipe.model), recipe)
        if tokens > room:
            raise GattError(
                f"The instruction {instruction.name!r} has {tokens} tokens; train.max_length = "
                f"{limit} has room for {max(0, room)} of them, with a question and its answer. "
                f"Shorten it, or set train.max_length to {limit + tokens - room} or more."
            )


def _count_tokens(text: str, model: Model, recipe: Recipe) -> int:
    vocabulary = LoadedModel(_open_student(model, recipe), vocab_only=True)
    tokens = len(vocabulary.tokenize(text))
    vocabulary.close()
    return tokens


def _open_student(model: Model, recipe: Recipe) -> GgufInfo:
    gguf = runnable_gguf(model, "" if model.is_gguf else recipe.synthesize.format or "F16")
    return open_gguf(gguf)


def _log_conversion_quality(model: Model, format_name: str) -> None:
    """Log the quality before and after the conversion, measured once and cached with the file."""
    before, after = runnable_gguf(model), cached_gguf(model, format_name)
    measurement = after.with_suffix(".json")
    if not measurement.exists():
        with lock_file(measurement):
            if not measurement.exists():  # another process may have measured it in the meantime
                write_json(measurement, _measure_conversion(model, before, after, format_name))
    saved = json.loads(measurement.read_text(encoding="utf-8"))
    log(
        f"synthesize: {model.name} in {format_name}: perplexity and good first answers "
        f"{_Quality(**saved['after'])}, before the conversion {_Quality(**saved['before'])}"
    )


def _measure_conversion(
    model: Model, before: Path, after: Path, format_name: str
) -> dict[str, dict[str, float]]:
    """Return the quality before and after the conversion, measured on built-in dialogues."""
    dialogues = load_dialogues("seed")[::2]
    label = f"synthesize: first answers of {model.name}, as it is and in {format_name}"
    with progress(label, 2 * len(dialogues)) as bar:
        return {
            "before": asdict(_measure(before, dialogues, bar)),
            "after": asdict(_measure(after, dialogues, bar)),
        }


def _measure(path: Path, dialogues: Sequence[Dialogue], bar: Progress) -> _Quality:
    """Measure a GGUF on the first turns of `dialogues`."""
    answers: list[str] = []

    def ask(question: str) -> Task:
        message: Message = {"role": "user", "content": question}
        reply = yield Request(
            messages=(message,),
            seed=1,
            max_tokens=80,
            stop_when=lambda text: has_sentences(text, 1),
        )
        answers.append(first_sentences(reply.text, 1))
        bar.advance()

    with BatchEngine(path, len(dialogues), 512) as engine:
        engine.run(ask(dialogue.turns[0]) for dialogue in dialogues)
        perplexity = engine.perplexity([" ".join(d.turns) for d in dialogues[:4]])
    good = sum(not find_defect(answer, (), require_ending=True) for answer in answers)
    return _Quality(perplexity, good / len(answers))


def generated_constraints(
    recipe: Recipe, run_dir: RunDir, dialogues: Sequence[Dialogue]
) -> list[Constraint]:
    """Return the values in `lists.toml`, after the teacher has listed the kinds that are missing.

    The language of the `dialogues` is no value: a plain answer is written in it, too.

    Raises:
        GattError: an edited list has a value that its kind does not take.
    """
    settings = recipe.instructions
    lists: dict[str, list[str]] = {}
    if run_dir.lists.exists():
        lists = _checked_lists(run_dir.lists)
        log(f"instructions: the values in {run_dir.lists} are used; delete it to list them again")
    missing = [kind for kind in settings.generate if kind not in lists]
    if missing:
        spoken = language_of(" ".join(turn for d in dialogues[:100] for turn in d.turns))
        with open_teacher(recipe, LISTS) as teacher:
            for kind in missing:
                values = _known_values(kind, teacher, recipe.seed, spoken)
                lists[kind] = values[: settings.generate_count]
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


def _known_values(kind: str, teacher: GenerationEngine, seed: int, spoken: str) -> list[str]:
    """Return the values that the teacher lists and knows, without the language `spoken`."""

    def run_tasks(tasks: Iterable[Task]) -> None:
        each = list(tasks)
        with progress(f"instructions: {kind}: answers", len(each)) as bar:
            teacher.run(_counted(task, bar) for task in each)

    listed = list_values(kind, run_tasks, seed)
    values = [value for value in listed.known if value != spoken]
    log(
        f"instructions: {kind}: {listed.candidates} listed, {len(values)} of them known to "
        f"the teacher: {', '.join(values)}"
    )
    if not values:
        raise GattError(
            f"The teacher knows none of the values that it listed for {kind!r}. Choose a larger "
            "teacher, or name values in instructions.pool."
        )
    return values


def _counted(task: Task, bar: Progress) -> Task:
    """Return the same task, which advances the bar at its end."""
    yield from task
    bar.advance()
