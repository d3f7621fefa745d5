"""Who answers in synthesis: a model on this machine, or an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from pipeline.console import log
from pipeline.data.dialogues import load_dialogues
from pipeline.files import write_json
from pipeline.gatt.quality import find_defect
from pipeline.gatt.text import first_sentences, has_sentences
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.openai_client import OpenAIClient
from pipeline.recipe import Recipe
from pipeline.records import Message, Request, Task

_CONCURRENCY = 24
"""Requests in flight to a server, where the recipe does not say."""


class GenerationEngine(Protocol):
    """Something that drives many dialogues side by side."""

    name: str

    def run(self, tasks: Iterable[Task]) -> None:
        """Drive all `tasks` to their end."""

    def __enter__(self) -> GenerationEngine: ...

    def __exit__(self, *_: object) -> None: ...


def open_generator(recipe: Recipe, dialogues: int) -> GenerationEngine:
    """The teacher that the recipe names, with room for up to `dialogues` at a time.

    Raises:
        GattError: no such model, or nobody answers at that address.
    """
    settings = recipe.synthesize
    name = settings.teacher or recipe.model
    if name.startswith(("http://", "https://")):
        url, _, served = name.partition("#")
        return OpenAIClient(url, served, settings.max_parallel or _CONCURRENCY)
    model = find_model(name)
    path, format_name = model.path, settings.format
    if format_name or not model.is_gguf:
        format_name = format_name or "F16"
        path = cached_gguf(model, format_name)
        _compare(
            f"{model.name} in {format_name}",
            model.path if model.is_gguf else cached_gguf(model, "Q8_0"),
            path,
        )
    context = recipe.dialogues.turns * (settings.max_tokens + 100) + 200
    return BatchEngine(
        path, dialogues, context, settings.max_parallel, name=f"{model.name} {format_name}".strip()
    )


def _compare(name: str, shipped: Path, converted: Path) -> None:
    """Print what the conversion costs in quality; measured once, and kept beside the converted file."""
    kept = converted.with_suffix(".json")
    if not kept.exists():
        log(f"synthesize: measuring {name} against {shipped.name}, once")
        write_json(kept, {"before": _quality(shipped), "after": _quality(converted)})
    found = json.loads(kept.read_text(encoding="utf-8"))
    sides = [
        f"{found[side]['perplexity']:.2f} and {found[side]['accepted']:.0%}"
        for side in ("before", "after")
    ]
    log(
        f"synthesize: {name}: perplexity and good first answers {sides[1]}, before the conversion {sides[0]}"
    )


def _quality(path: Path) -> dict[str, Any]:
    """Perplexity on users' turns of the built-in dialogues, and the share of good answers to their first ones."""
    dialogues = load_dialogues("seed")[::2]
    answers: list[str] = []

    def ask(question: str) -> Task:
        message: Message = {"role": "user", "content": question}
        said = yield Request((message,), 1, 80, stop_when=lambda text: has_sentences(text, 1))
        answers.append(first_sentences(said.text, 1))

    with BatchEngine(path, len(dialogues), 512) as llama:
        llama.run(ask(d.turns[0]) for d in dialogues)
        perplexity = llama.perplexity([" ".join(d.turns) for d in dialogues[:4]])
    good = sum(not find_defect(answer, (), finished=True) for answer in answers)
    return {"perplexity": perplexity, "accepted": good / len(answers)}
