"""`gatt train`: a 4-bit QLoRA on the ghosted dialogues; `--show-labels` shows which tokens are learned."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import capture_output, log, print_result, progress
from pipeline.data.dialogues import load_chats
from pipeline.errors import GattError
from pipeline.files import JsonlLog, read_jsonl, write_json
from pipeline.gatt.assignment import read_split
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Recipe, Train
from pipeline.records import Message
from pipeline.run_dir import RunDir
from pipeline.system import GB, is_main_process, require_disk, trim_memory
from pipeline.training.examples import IGNORE_INDEX, TrainingExample, build_example
from pipeline.training.memory import tokens_that_fit, training_memory
from pipeline.training.trainer import Step, last_checkpoint, main_process_first, world_size
from pipeline.training.unsloth import free_memory, load_tokenizer, on_gpu, train
from pipeline.training.validation import Validation

SECTIONS = ("train",)
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    files = [Path(recipe.train.replay_data).expanduser()] if recipe.train.replay_data else []
    if recipe.train.init_adapter:
        files.append(Path(recipe.train.init_adapter).expanduser() / "adapter_model.safetensors")
    own = [file for file in files if file.is_file()]
    return [find_model(recipe.model).path, run_dir.examples, *own]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Train and write `train/adapter` and the loss of every step; goes on from the last checkpoint."""
    output = run_dir.checkpoints.parent / "unsloth.log"
    with main_process_first(), capture_output(output):
        folder = cached_checkpoint(find_model(recipe.model))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    require_disk(run_dir.path, size, "keep checkpoints")
    tokenizer = load_tokenizer(folder)
    examples = [labeled(tokenizer, row, recipe) for _, row in read_jsonl(run_dir.examples)]
    if recipe.train.replay_data:
        examples += [
            build_example(tokenizer, chat, recipe.train) for chat in mixed(recipe, len(examples))
        ]
    settings = fitting(recipe, max(max(len(e.labels), len(e.teacher_ids)) for e in examples))
    if not is_main_process():
        with capture_output(output):
            train(
                folder,
                examples,
                settings,
                recipe.seed,
                run_dir.checkpoints,
                run_dir.adapter,
                lambda step: None,
            )
        return
    learned = sum(token != IGNORE_INDEX for e in examples for token in e.labels)
    log(
        f"train: {len(examples)} dialogues, {sum(len(e.labels) for e in examples)} tokens, {learned} of them learned"
    )
    steps: list[Step] = []
    with (
        progress(
            "train: steps", recipe.train.max_steps, last_checkpoint(run_dir.checkpoints)
        ) as bar,
        capture_output(output),
        _watching(recipe, run_dir) as (enough, seen),
    ):
        losses, reference = train(
            folder,
            examples,
            settings,
            recipe.seed,
            run_dir.checkpoints,
            run_dir.adapter,
            lambda step: bar.advance(1, _line(steps, step) + "".join(seen[-1:])),
            enough,
        )
    trim_memory()
    reference.save(run_dir.reference)
    write_json(run_dir.losses, losses)
    if steps:
        write_json(run_dir.speed, steps[-1]._asdict())


def fitting(recipe: Recipe, longest: int) -> Train:
    """The recipe's settings, with as many tokens at a time as fit here if these are fewer than a step has.

    Raises:
        GattError: not even the longest dialogue fits.
    """
    settings, shape = recipe.train, shape_of(recipe.model)
    memory = free_memory() / (1 if on_gpu() else world_size())
    tokens = settings.max_tokens_per_micro_batch or settings.batch_size // world_size() * longest
    fit = tokens_that_fit(shape, settings, memory, on_gpu())
    if fit < longest:
        needed = training_memory(shape, settings, longest, on_gpu())
        raise GattError(
            f"Too little memory to train {recipe.model}: {needed / GB:.1f} GB needed for a dialogue of {longest} tokens, "
            f"{memory / GB:.1f} GB free. Close other programs, lower train.max_length, or take a smaller model (`gatt doctor` "
            "lists what fits)."
        )
    need = training_memory(shape, settings, min(fit, tokens), on_gpu())
    log(
        f"train: about {need / GB:.1f} GB of {memory / GB:.1f}"
        + (f", {fit} tokens at a time" if fit < tokens else "")
    )
    return (
        settings.model_copy(update={"max_tokens_per_micro_batch": fit})
        if fit < tokens
        else settings
    )


def _line(steps: list[Step], step: Step) -> str:
    """What is shown of a step."""
    steps.append(step)
    return (
        f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, {step.learned / step.seconds:.0f} learned tokens/s, "
        f"{step.memory / GB:.1f} GB"
    )


@contextmanager
def _watching(
    recipe: Recipe, run_dir: RunDir
) -> Iterator[tuple[Callable[[int, Path], bool], list[str]]]:
    """What is asked at each checkpoint: it measures adherence, writes it down, and says whether that is enough. With it, the
    remarks that it makes.
    """
    seen: list[str] = []
    pairs = read_split(run_dir.pairs, "validate")
    if not pairs:
        if recipe.train.early_stop_adherence:
            raise GattError(
                "train.early_stop_adherence needs held-out dialogues that a program can check: raise dialogues.validation."
            )
        yield lambda step, folder: False, seen
        return
    validation = Validation(cached_gguf(find_model(recipe.model), "Q8_0"), pairs, recipe)

    def enough(step: int, folder: Path) -> bool:
        found = validation.measure(folder)
        kept, answers = sum(its for _, its in found), len(found)
        records.append({"step": step, "kept": kept, "answers": answers})
        seen.append(f", {kept} of {answers} held-out answers obeyed at step {step}")
        return (
            bool(recipe.train.early_stop_adherence)
            and kept >= recipe.train.early_stop_adherence * answers
        )

    try:
        with JsonlLog(run_dir.validation) as records:
            yield enough, seen
    finally:
        validation.close()


def mixed(recipe: Recipe, beside: int) -> list[tuple[Message, ...]]:
    """Of the user's own chats as many as make their share `beside` the synthesized ones, drawn by the seed."""
    share = recipe.train.replay_ratio
    chats = load_chats(recipe.train.replay_data)
    wanted = round(beside * share / (1 - share))
    if len(chats) < wanted:
        log(
            f"train: {recipe.train.replay_data} has {len(chats)} chats, {wanted} would be a share of {share:g}; all are taken."
        )
    return random.Random(f"mix {recipe.seed}").sample(chats, min(wanted, len(chats)))


def labeled(tokenizer: Any, row: dict[str, Any], recipe: Recipe) -> TrainingExample:
    """In a sampled answer every word was chosen with the instruction in sight: if it is not distilled, all of it is lesson."""
    lesson = row["way"] == "sampled" and recipe.train.loss != "distill"
    return build_example(tokenizer, row["messages"], recipe.train, () if lesson else row["asked"])


def show_labels(recipe: Recipe, run_dir: RunDir) -> None:
    """Print the first training dialogue, learned tokens in green (or in brackets off a terminal)."""
    import sys

    tokenizer = load_tokenizer(cached_checkpoint(find_model(recipe.model)))
    example = labeled(tokenizer, next(read_jsonl(run_dir.examples))[1], recipe)
    start, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    print_result(marked(tokenizer, example, start, end))


def marked(tokenizer: object, example: TrainingExample, start: str, end: str) -> str:
    """The dialogue as text with the learned stretches between `start` and `end`."""
    pieces: list[str] = []
    inside = False
    for token, target in zip(example.input_ids, example.labels, strict=True):
        if (target != IGNORE_INDEX) != inside:
            pieces.append(end if inside else start)
            inside = not inside
        pieces.append(tokenizer.decode([token]))  # type: ignore[attr-defined]
    return "".join(pieces) + (end if inside else "")
