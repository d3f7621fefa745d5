"""`gatt train`: a 4-bit QLoRA on the ghosted dialogues; `--show-labels` shows which tokens are learned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import chatter, note, out, progress
from pipeline.data.dialogues import load_chats
from pipeline.errors import GattError
from pipeline.files import JsonlLog, read_jsonl, write_json
from pipeline.gatt.assignment import read_pairs
from pipeline.hub.convert import gguf_file, hugging_face_folder
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Recipe, Train
from pipeline.records import Message
from pipeline.run_dir import RunDir
from pipeline.system import GB, give_back, leads, require_disk
from pipeline.training.examples import IGNORED, Labelled, label
from pipeline.training.memory import tokens_that_fit, training_memory
from pipeline.training.trainer import Step, last_checkpoint, leader_first, processes
from pipeline.training.unsloth import free_memory, load_tokenizer, on_gpu, train
from pipeline.training.validation import Validation


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Train and write `train/adapter` and the loss of every step; goes on from the last checkpoint."""
    log = rundir.checkpoints.parent / "unsloth.log"
    with leader_first(), chatter(log):
        folder = hugging_face_folder(find_model(recipe.model))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    require_disk(rundir.path, size, "keep checkpoints")
    tokenizer = load_tokenizer(folder)
    examples = [labelled(tokenizer, row, recipe) for _, row in read_jsonl(rundir.examples)]
    if recipe.train.mix:
        examples += [label(tokenizer, chat, recipe.train) for chat in mixed(recipe, len(examples))]
    settings = fitting(recipe, max(max(len(e.labels), len(e.asked_ids)) for e in examples))
    if not leads():
        with chatter(log):
            train(
                folder,
                examples,
                settings,
                recipe.seed,
                rundir.checkpoints,
                rundir.adapter,
                lambda step: None,
            )
        return
    learned = sum(token != IGNORED for e in examples for token in e.labels)
    note(
        f"train: {len(examples)} dialogues, {sum(len(e.labels) for e in examples)} tokens, {learned} of them learned"
    )
    steps: list[Step] = []
    with (
        progress("train: steps", recipe.train.steps, last_checkpoint(rundir.checkpoints)) as bar,
        chatter(log),
        _watching(recipe, rundir) as (enough, seen),
    ):
        losses, reference = train(
            folder,
            examples,
            settings,
            recipe.seed,
            rundir.checkpoints,
            rundir.adapter,
            lambda step: bar.advance(1, _line(steps, step) + "".join(seen[-1:])),
            enough,
        )
    give_back()
    reference.save(rundir.reference)
    write_json(rundir.losses, losses)
    if steps:
        write_json(rundir.speed, steps[-1]._asdict())


def fitting(recipe: Recipe, longest: int) -> Train:
    """The recipe's settings, with as many tokens at a time as fit here if these are fewer than a step has.

    Raises:
        GattError: not even the longest dialogue fits.
    """
    settings, shape = recipe.train, shape_of(recipe.model)
    memory = free_memory() / (1 if on_gpu() else processes())
    tokens = settings.tokens or settings.batch // processes() * longest
    fit = tokens_that_fit(shape, settings, memory, on_gpu())
    if fit < longest:
        needed = training_memory(shape, settings, longest, on_gpu())
        raise GattError(
            f"Too little memory to train {recipe.model}: {needed / GB:.1f} GB needed for a dialogue of {longest} tokens, "
            f"{memory / GB:.1f} GB free. Close other programs, lower train.max_length, or take a smaller model (`gatt doctor` "
            "lists what fits)."
        )
    need = training_memory(shape, settings, min(fit, tokens), on_gpu())
    note(
        f"train: about {need / GB:.1f} GB of {memory / GB:.1f}"
        + (f", {fit} tokens at a time" if fit < tokens else "")
    )
    return settings.model_copy(update={"tokens": fit}) if fit < tokens else settings


def _line(steps: list[Step], step: Step) -> str:
    """What is shown of a step."""
    steps.append(step)
    return (
        f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, {step.learned / step.seconds:.0f} learned tokens/s, "
        f"{step.memory / GB:.1f} GB"
    )


@contextmanager
def _watching(
    recipe: Recipe, rundir: RunDir
) -> Iterator[tuple[Callable[[int, Path], bool], list[str]]]:
    """What is asked at each checkpoint: it measures adherence, writes it down, and says whether that is enough. With it, the
    remarks that it makes.
    """
    seen: list[str] = []
    pairs = read_pairs(rundir.pairs, "validate")
    if not pairs:
        if recipe.train.stop_when:
            raise GattError(
                "train.stop_when needs held-out dialogues that a program can check: raise dialogues.watched."
            )
        yield lambda step, folder: False, seen
        return
    validation = Validation(gguf_file(find_model(recipe.model), "Q8_0"), pairs, recipe)

    def enough(step: int, folder: Path) -> bool:
        found = validation.measure(folder)
        kept, answers = sum(its for _, its in found), len(found)
        log.append({"step": step, "kept": kept, "answers": answers})
        seen.append(f", {kept} of {answers} held-out answers obeyed at step {step}")
        return bool(recipe.train.stop_when) and kept >= recipe.train.stop_when * answers

    try:
        with JsonlLog(rundir.validation) as log:
            yield enough, seen
    finally:
        validation.close()


def mixed(recipe: Recipe, beside: int) -> list[tuple[Message, ...]]:
    """Of the user's own chats as many as make their share `beside` the synthesised ones, drawn by the seed."""
    share = recipe.train.mix_share
    chats = load_chats(recipe.train.mix)
    wanted = round(beside * share / (1 - share))
    if len(chats) < wanted:
        note(
            f"train: {recipe.train.mix} has {len(chats)} chats, {wanted} would be a share of {share:g}; all are taken."
        )
    return random.Random(f"mix {recipe.seed}").sample(chats, min(wanted, len(chats)))


def labelled(tokenizer: Any, row: dict[str, Any], recipe: Recipe) -> Labelled:
    """In a sampled answer every word was chosen with the instruction in sight: if it is not distilled, all of it is lesson."""
    lesson = row["way"] == "sampled" and recipe.train.loss != "distill"
    return label(tokenizer, row["messages"], recipe.train, () if lesson else row["asked"])


def show_labels(recipe: Recipe, rundir: RunDir) -> None:
    """Print the first training dialogue, learned tokens in green (or in brackets off a terminal)."""
    import sys

    tokenizer = load_tokenizer(hugging_face_folder(find_model(recipe.model)))
    example = labelled(tokenizer, next(read_jsonl(rundir.examples))[1], recipe)
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
