"""`gatt train`: a 4-bit QLoRA on the ghosted dialogues; `--show-labels` shows which tokens are learned."""

from __future__ import annotations

from typing import Any

from pipeline.backends.convert import hugging_face_folder
from pipeline.backends.hub import find_model
from pipeline.backends.objective import IGNORED, Labelled, label
from pipeline.backends.trainer import last_checkpoint
from pipeline.backends.unsloth import load_tokenizer, on_gpu, train
from pipeline.config import Recipe
from pipeline.console import chatter, note, out, progress
from pipeline.files import read_jsonl, write_json
from pipeline.machine import require_disk, require_memory, training_memory
from pipeline.rundir import RunDir


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Train and write `train/adapter` and the loss of every step; goes on from the last checkpoint."""
    log = rundir.checkpoints.parent / "unsloth.log"
    with chatter(log):
        folder = hugging_face_folder(find_model(recipe.model))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    require_disk(rundir.path, size, "keep checkpoints")
    tokenizer = load_tokenizer(folder)
    examples = [_labelled(tokenizer, row, recipe) for _, row in read_jsonl(rundir.examples)]
    if not on_gpu():
        longest = recipe.train.batch * max(len(e.labels) for e in examples)
        require_memory(training_memory(size / 2, "cpu", longest), f"train {recipe.model}")
    learned = sum(token != IGNORED for e in examples for token in e.labels)
    note(f"train: {len(examples)} dialogues, {sum(len(e.labels) for e in examples)} tokens, {learned} of them learned")
    with progress("train: steps", recipe.train.steps, last_checkpoint(rundir.checkpoints)) as bar, chatter(log):
        losses, reference = train(
            folder, examples, recipe.train, recipe.seed, rundir.checkpoints, rundir.adapter,
            lambda step, loss: bar.advance(1, f"loss {loss:.3f}"),
        )  # fmt: skip
    reference.save(rundir.reference)
    write_json(rundir.losses, losses)


def _labelled(tokenizer: Any, row: dict[str, Any], recipe: Recipe) -> Labelled:
    """In a sampled answer every word was chosen with the instruction in sight: if it is not distilled, all of it is lesson."""
    lesson = row["way"] == "sampled" and recipe.train.loss != "distill"
    return label(tokenizer, row["messages"], recipe.train, () if lesson else row["asked"])


def show_labels(recipe: Recipe, rundir: RunDir) -> None:
    """Print the first training dialogue, learned tokens in green (or in brackets off a terminal)."""
    import sys

    tokenizer = load_tokenizer(hugging_face_folder(find_model(recipe.model)))
    example = _labelled(tokenizer, next(read_jsonl(rundir.examples))[1], recipe)
    start, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    out(marked(tokenizer, example, start, end))


def marked(tokenizer: object, example: Labelled, start: str, end: str) -> str:
    """The dialogue as text with the learned stretches between `start` and `end`."""
    pieces: list[str] = []
    inside = False
    for token, target in zip(example.input_ids, example.labels, strict=True):
        if (target != IGNORED) != inside:
            pieces.append(end if inside else start)
            inside = not inside
        pieces.append(tokenizer.decode([token]))  # type: ignore[attr-defined]
    return "".join(pieces) + (end if inside else "")
