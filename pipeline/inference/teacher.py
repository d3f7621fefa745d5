"""The teacher: the model or server whose answers become training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.console import Progress, log, progress
from pipeline.data.dialogues import load_dialogues
from pipeline.files import write_json
from pipeline.folders import lock_file
from pipeline.gatt.quality import find_defect
from pipeline.gatt.text import first_sentences, has_sentences
from pipeline.hub.convert import cached_gguf, runnable_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import GenerationEngine, context_for, open_generator
from pipeline.inference.remote.address import is_server_url
from pipeline.recipe import Recipe
from pipeline.records import Dialogue, Message, Request, Task

_USER_TOKENS = 100
"""Tokens of a user message of the teacher's: the instruction stands in every one of them."""


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
