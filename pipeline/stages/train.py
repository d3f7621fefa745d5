"""`gatt train`: a 4-bit QLoRA on the ghosted dialogues; `--show-labels` shows what is learned."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipeline.cluster.session import current_cluster
from pipeline.cluster.storage import choose_storage, is_used
from pipeline.console import capture_output, log, print_result, progress
from pipeline.data.sources import source_inputs
from pipeline.errors import GattError
from pipeline.files import JsonlLog, read_jsonl, write_json
from pipeline.gatt.assignment import check_files, held_out_turns, read_split
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Recipe
from pipeline.records import SynthesizedDialogue
from pipeline.run_dir import Input, RunDir
from pipeline.system import GB, is_main_process, require_disk, trim_memory
from pipeline.training.backend import Backend, choose_backend
from pipeline.training.examples import (
    example_from_row,
    mark_learned,
    random_slips,
    training_examples,
)
from pipeline.training.job import (
    Step,
    TrainingJob,
    TrainingResult,
    check_init_adapter,
    from_main_process,
    last_checkpoint,
    main_process_first,
    require_reporters,
)
from pipeline.training.memory import fit_to_memory, tokens_that_fit
from pipeline.training.unsloth import free_memory, load_tokenizer, on_gpu
from pipeline.training.validation import (
    AdaptableBase,
    Schedule,
    Validation,
    require_validation,
    validation_gpu_bytes,
)

SECTIONS = ("train",)
"""Sections of the recipe that the result depends on."""

_DISK_BYTES_PER_WEIGHT = 3 * 12
"""Of an adapter: three checkpoints in float32, each with two moments of the optimizer."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Input]:
    """Return what the result depends on.

    Raises:
        GattError: training would start from the adapter that it is about to move aside.
    """
    settings = recipe.train
    init_adapter = Path(settings.init_adapter).expanduser()
    if settings.init_adapter and run_dir.adapter.parent.resolve() in init_adapter.resolve().parents:
        raise GattError(
            f"train.init_adapter: {init_adapter} is in the run that is to be trained again, which "
            "moves it aside. Use another --run, or copy the adapter first."
        )
    replayed = source_inputs(settings.replay_data) if settings.replay_data else []
    adapter = sorted(init_adapter.glob("adapter_*"))
    # The validation split is among the assignments, and what must not be replayed.
    assignments: list[Path] = []
    if settings.early_stop_adherence:
        assignments = [run_dir.assignments, *check_files(run_dir.assignments)]
    elif settings.replay_data:
        assignments = [run_dir.assignments]
    return [
        find_model(recipe.model).path,
        run_dir.examples,
        *replayed,
        *(adapter if settings.init_adapter else ()),
        *assignments,
    ]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Train `train/adapter` and write the loss of every step; resume from the last checkpoint."""
    if cluster := current_cluster():
        _train_on_cluster(recipe, run_dir, cluster.storage)
        return
    if is_used(run_dir.checkpoints) and not last_checkpoint(run_dir.checkpoints):
        log("train: this training began with --ray. Only with it, it goes on from its checkpoints.")
    train_here(recipe, run_dir)


def _train_on_cluster(recipe: Recipe, run_dir: RunDir, storage: str) -> None:
    """Train with the processes of a cluster, which get the files of the run that they need."""
    from pipeline.cluster.train import train_on_ray

    files = {
        path.relative_to(run_dir.path).as_posix(): path.read_bytes()
        for path in (run_dir.examples, run_dir.assignments)
    }
    train_on_ray(
        partial(_train_in, _with_absolute_paths(recipe)),
        files,
        run_dir.path,
        storage=choose_storage(run_dir.checkpoints, storage),
        batch=recipe.train.batch_size,
    )


def _train_in(recipe: Recipe, folder: Path, on_checkpoint: Callable[[int], None]) -> None:
    train_here(recipe, RunDir(folder), on_checkpoint)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe for processes that work in other folders."""
    model = Path(recipe.model).expanduser()
    is_path = model.is_file() or (model / "config.json").is_file()
    train = {
        key: str(path.absolute())
        for key in ("init_adapter", "replay_data")
        if (name := getattr(recipe.train, key)) and (path := Path(name).expanduser()).exists()
    }
    return recipe.model_copy(
        update={
            "model": str(model.absolute()) if is_path else recipe.model,
            "train": recipe.train.model_copy(update=train),
        }
    )


def train_here(
    recipe: Recipe, run_dir: RunDir, on_checkpoint: Callable[[int], None] = lambda step: None
) -> None:
    """Train in this process, and in those that share its steps.

    `on_checkpoint` is called in all of them after each checkpoint, with its step.
    """
    require_reporters(recipe.train)
    with main_process_first(), capture_output(run_dir.training_log):
        model_dir = cached_checkpoint(find_model(recipe.model))
    adapter = shape_of(recipe.model).adapter_parameters(recipe.train)
    require_disk(run_dir.path, _DISK_BYTES_PER_WEIGHT * adapter, "keep checkpoints")
    backend = choose_backend()  # outside of `capture_output`: it may have something to say
    tokenizer = load_tokenizer(model_dir)
    if recipe.train.init_adapter:
        check_init_adapter(recipe.train, str(tokenizer.chat_template or ""))
    held_out = held_out_turns(run_dir.assignments) if recipe.train.replay_data else set()
    examples = training_examples(tokenizer, recipe, run_dir.examples, held_out)
    longest = max(e.max_tokens for e in examples)
    validation_bytes = _validation_gpu_bytes(recipe, run_dir, longest)
    plan = fit_to_memory(recipe, longest, free_memory(), gpu=on_gpu(), taken_bytes=validation_bytes)
    job = TrainingJob(
        model_dir=model_dir,
        examples=examples,
        settings=plan.settings,
        stored_layers=plan.stored_layers,
        logits_per_chunk=plan.logits_per_chunk,
        dequantize=plan.dequantize,
        seed=recipe.seed,
        checkpoint_dir=run_dir.checkpoints,
        adapter_dir=run_dir.adapter,
    )
    if not is_main_process():
        job = _last_checkpoint_only(job) if from_main_process(flag=False) else job
        with capture_output(run_dir.training_log):
            backend.train(_reporting(job, on_checkpoint))
        return
    log(
        f"train: {len(examples)} dialogues, {sum(len(e.labels) for e in examples)} tokens, "
        f"{sum(e.learned_tokens for e in examples)} of them learned"
    )
    gpu = not on_gpu() or validation_bytes > 0
    with (
        closing(adaptable_base(recipe, gpu=gpu)) as base,
        closing(ValidationHook(recipe, run_dir, base)) as hook,
    ):
        done = last_checkpoint(run_dir.checkpoints)
        reached = bool(done) and hook.has_reached(done, run_dir.checkpoints / f"checkpoint-{done}")
        job = _last_checkpoint_only(job) if from_main_process(flag=reached) else job
        job = _reporting(replace(job, should_stop=hook.should_stop), on_checkpoint)
        result, steps = _train(backend, job, run_dir, lambda: hook.last_note)
    trim_memory()
    result.logits.save(run_dir.reference)
    write_json(run_dir.losses, result.losses)
    if steps:
        write_json(run_dir.speed, _speed(steps[-1]))


def _last_checkpoint_only(job: TrainingJob) -> TrainingJob:
    """Return the job without any steps after its last checkpoint."""
    steps = last_checkpoint(job.checkpoint_dir)
    return replace(job, settings=job.settings.model_copy(update={"max_steps": steps}))


def _reporting(job: TrainingJob, on_checkpoint: Callable[[int], None]) -> TrainingJob:
    """Return the job with `on_checkpoint` after what it does at a checkpoint anyway."""

    def should_stop(step: int, checkpoint: Path) -> bool:
        stop = job.should_stop(step, checkpoint)
        on_checkpoint(step)
        return stop

    return replace(job, should_stop=should_stop)


def _train(
    backend: Backend, job: TrainingJob, run_dir: RunDir, remark: Callable[[], str]
) -> tuple[TrainingResult, list[Step]]:
    """Train with a progress bar; return the steps of this process, too."""
    steps: list[Step] = []
    done = last_checkpoint(run_dir.checkpoints)
    with (
        progress("train: steps", job.settings.max_steps, done) as bar,
        capture_output(run_dir.training_log),
    ):

        def on_step(step: Step) -> None:
            steps.append(step)
            bar.advance(log=format_step(step) + remark())

        return backend.train(replace(job, on_step=on_step)), steps


def _speed(totals: Step) -> dict[str, float]:
    """Return the tokens, seconds and memory of training."""
    speed = {"seconds": totals.seconds, "peak_memory_bytes": totals.peak_memory_bytes}
    return totals.tokens._asdict() | speed


def adaptable_base(recipe: Recipe, *, gpu: bool = True) -> AdaptableBase:
    """Return the base that validates the adapters of training; it is not loaded yet."""
    model = find_model(recipe.model)
    folder = model.path if converter_for(model.path) else None
    make_file = partial(cached_gguf, model, "Q8_0")
    return AdaptableBase(make_file, folder=folder, dora=recipe.train.dora, gpu=gpu)


def _validation_gpu_bytes(recipe: Recipe, run_dir: RunDir, longest: int) -> float:
    """Return the bytes that validation takes on the GPU; 0 where it is on the CPU.

    That is where llama.cpp has no GPU, or a whole step of training would not fit beside it.
    """
    if not on_gpu():
        return 0
    shape, settings = shape_of(recipe.model), recipe.train
    dialogues = len(read_split(run_dir.assignments, "validation"))
    needed = validation_gpu_bytes(shape, dialogues)
    tokens = settings.max_tokens_per_micro_batch or settings.batch_size * longest
    fitting = tokens_that_fit(shape, settings, free_memory() - needed, gpu=True)
    return needed if fitting >= tokens else 0


class ValidationHook:
    """Measure adherence at checkpoints, log it, and decide whether that is enough.

    `last_note` is a remark on the last checkpoint, "" before the first. `base` answers with the
    checkpoints' adapters.

    Raises:
        GattError: the recipe asks for early stopping, but there are no validation dialogues.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, base: AdaptableBase) -> None:
        self.last_note = ""
        self._schedule = Schedule()
        self._base = base
        self._threshold = recipe.train.early_stop_adherence
        self._validation: Validation | None = None
        dialogues = read_split(run_dir.assignments, "validation")
        require_validation(recipe, dialogues)
        if dialogues:
            self._validation = Validation(base, dialogues, recipe)
            self._log = JsonlLog(run_dir.validation)

    def should_stop(self, step: int, checkpoint: Path) -> bool:
        """Measure the adapter in `checkpoint`; return whether its adherence is high enough."""
        if not self._validation:
            return False
        if not self._schedule.is_due():
            self.last_note = (
                f", no validation at step {step}: the last one took "
                f"{self._schedule.last_seconds:.0f} s, and a quarter of the time is the limit"
            )
            return False
        self._base.prepare()  # takes long only once, so it does not count
        with self._schedule.validation():
            replies = self._validation.measure(checkpoint)
        adherent, answers = sum(reply.adherent for reply in replies), len(replies)
        self._log.append({"step": step, "adherent": adherent, "answers": answers})
        self.last_note = f", {adherent} of {answers} validation answers adherent at step {step}"
        return self._is_enough(adherent, answers)

    def has_reached(self, step: int, checkpoint: Path) -> bool:
        """Return whether training ends at a checkpoint of an earlier attempt.

        It may have been interrupted in the validation, or after it.
        """
        if not self._threshold:
            return False
        for row in reversed(self._log.records):
            if row["step"] == step:
                return self._is_enough(row["adherent"], row["answers"])
        return self.should_stop(step, checkpoint)

    def _is_enough(self, adherent: int, answers: int) -> bool:
        return bool(self._threshold and answers) and adherent >= self._threshold * answers

    def close(self) -> None:
        """Close the log."""
        if self._validation:
            self._log.close()


def format_step(step: Step) -> str:
    """Return what the progress bar shows of a step."""
    return (
        f"loss {step.loss:.3f}, rate {step.learning_rate:.1e}, "
        f"{step.tokens.learned / step.seconds:.0f} learned tokens/s, "
        f"{step.peak_memory_bytes / GB:.1f} GB"
    )


def show_labels(recipe: Recipe, run_dir: RunDir) -> None:
    """Print the first dialogue, its learned tokens in green, or in brackets off a terminal."""
    tokenizer = load_tokenizer(cached_checkpoint(find_model(recipe.model)))
    row: SynthesizedDialogue = next(read_jsonl(run_dir.examples))[1]
    example = example_from_row(tokenizer, row, recipe, random_slips(row, recipe))
    start, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")
    print_result(mark_learned(tokenizer, example, start, end))
