"""The training part of the GPU bench: one arm, in a process of its own.

    python gpu_training.py gatt|unsloth --model FOLDER --out ROWS [--quick]

"gatt" trains as `gatt train` does; "unsloth" is what Unsloth's notebooks do: TRL's `SFTTrainer` on
Unsloth's model, `adamw_8bit`, Unsloth's checkpointing. Both train two workloads.

lengths: one chat a step, of 512 to 8,192 tokens, the same chats in the same order with the same
labels in both arms. gatt has nothing stored beyond what its smallest plan needs, and the same
optimizer. Every second chat of gatt is distilled, which adds a pass of the base model.
dialogues: two epochs over chats of 2 to 8 turns in batches of 4, of which the second is timed. gatt
uses the memory of the card as `gatt train` plans it, and learns every answer; TRL learns the last
one, which is its default for a prompt and its completion.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_rows import append_row
from gpu_workload import (
    FULL,
    QUICK,
    SEED,
    Workload,
    case_of,
    chats_of_lengths,
    learn_last_answer,
    make_dialogues,
)

from pipeline.hub.models import shape_of
from pipeline.recipe import Recipe, Train
from pipeline.system import peak_memory
from pipeline.training.backend import choose_backend
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import Step, TrainingJob, length_grouped_batches
from pipeline.training.memory import fit_to_memory, training_memory
from pipeline.training.unsloth import free_memory, on_gpu

if TYPE_CHECKING:
    import transformers
    import trl

ARMS = ("gatt", "unsloth")
RANK, LEARNING_RATE, BATCH_SIZE = 32, 2e-4, 4


class StepClock:
    """Takes the time and the peak of memory since the last step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._last = time.perf_counter()

    def tick(self) -> tuple[float, int]:
        """Return the seconds and the peak in bytes of the step that ends now."""
        import torch

        peak = peak_memory()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.ends.append(now)
        return seconds, peak


def training_job(
    model_dir: Path, chats: Sequence[TrainingExample], settings: Train, folder: Path
) -> TrainingJob:
    """Return the job of `gatt train` for these chats."""
    return TrainingJob(
        model_dir=model_dir,
        examples=chats,
        settings=settings,
        seed=SEED,
        checkpoint_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
    )


def settings_for(chats: Sequence[TrainingExample], **changes: Any) -> Train:
    """Return the recipe's settings with the sizes of the bench."""
    fields = {
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "save_steps": 10_000,
        "max_length": max(64, *(chat.max_tokens for chat in chats)),
        **changes,
    }
    return Train(**fields)


class Arm:
    """What both arms share: the model, the workload, and where rows go."""

    def __init__(self, name: str, model_dir: Path, out: Path, workload: Workload) -> None:
        self.model_dir, self.workload, self.name = model_dir, workload, name
        self.row = partial(append_row, out, part="training", arm=name, process=os.getpid())
        self.clock = StepClock()

    def lengths_job(self, folder: Path) -> TrainingJob:
        """Return the job of "lengths", whose batches give the order of the steps in both arms."""
        chats = chats_of_lengths(self.workload, distill=self.name == "gatt")
        settings = settings_for(
            chats, loss="distill", batch_size=1, max_steps=len(chats), optimizer="adamw_8bit"
        )
        return training_job(self.model_dir, chats, settings, folder)

    def record_length(self, chat: TrainingExample, settings: Train) -> None:
        """Write the row of a step of "lengths"."""
        import torch

        seconds, peak = self.clock.tick()
        context = reserved = 0
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            reserved = torch.cuda.memory_reserved()
            context = total - free - reserved  # with whatever other programs have on the card
        predicted = training_memory(
            shape_of(str(self.model_dir)), settings, chat.max_tokens, gpu=on_gpu(), validation=False
        )
        self.row(
            case=case_of(chat).name,
            tokens=len(chat.input_ids),
            learned=chat.learned_tokens,
            seconds=seconds,
            peak_bytes=peak,
            context_bytes=context,
            reserved_bytes=reserved,
            predicted_bytes=predicted if self.name == "gatt" else None,
        )

    def record_dialogues(
        self, dialogues: Sequence[TrainingExample], labels: Sequence[Sequence[int]], peak: int
    ) -> None:
        """Write the row of "dialogues": its second epoch."""
        steps = len(dialogues) // BATCH_SIZE
        self.row(
            case="dialogues",
            tokens=sum(len(chat.input_ids) for chat in dialogues),
            learned=sum(label != IGNORE_INDEX for chat in labels for label in chat),
            seconds=self.clock.ends[-1] - self.clock.ends[-1 - steps],
            steps=steps,
            peak_bytes=peak,
        )


def train_gatt(model_dir: Path, out: Path, workload: Workload, folder: Path) -> None:
    """Train both workloads through the backend of `gatt train`."""
    arm = Arm("gatt", model_dir, out, workload)
    job = arm.lengths_job(folder / "lengths")
    order = length_grouped_batches(job)

    def on_step(step: Step) -> None:
        arm.record_length(order[step.number - 1], job.settings)

    choose_backend().train(replace(job, on_step=on_step))

    dialogues, peaks = make_dialogues(workload), [0]
    settings = settings_for(
        dialogues,
        loss="all_turns",
        batch_size=BATCH_SIZE,
        max_steps=2 * len(dialogues) // BATCH_SIZE,
    )
    longest = max(chat.max_tokens for chat in dialogues)
    recipe = Recipe(model=str(model_dir), train=settings)
    plan = fit_to_memory(recipe, longest, free_memory(), gpu=on_gpu())
    planned = replace(
        training_job(model_dir, dialogues, plan.settings, folder / "dialogues"),
        stored_layers=plan.stored_layers,
        logits_per_chunk=plan.logits_per_chunk,
        on_step=lambda _: peaks.append(arm.clock.tick()[1]),
    )
    choose_backend().train(planned)
    arm.record_dialogues(dialogues, [chat.labels for chat in dialogues], max(peaks))


def train_unsloth(model_dir: Path, out: Path, workload: Workload, folder: Path) -> None:
    """Train both workloads with TRL's trainer on Unsloth's model."""
    # Not through `load_unsloth`: it has Unsloth return logits, which costs time and memory.
    from unsloth import FastLanguageModel as Loader

    arm = Arm("unsloth", model_dir, out, workload)
    job = arm.lengths_job(folder / "lengths")
    defaults = Train()
    model, tokenizer = Loader.from_pretrained(
        str(model_dir), max_seq_length=job.settings.max_length, load_in_4bit=True
    )
    model = Loader.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        target_modules=list(defaults.target_modules),
        use_gradient_checkpointing="unsloth" if on_gpu() else False,
        random_state=SEED,
    )
    order = length_grouped_batches(job)
    trainer = _sft_trainer(
        model, tokenizer, [(chat.input_ids, chat.labels) for chat in order], folder / "lengths"
    )
    numbers = iter(order)
    _train(trainer, lambda: arm.record_length(next(numbers), job.settings))

    dialogues, peaks = make_dialogues(workload), [0]
    labels = [learn_last_answer(chat.labels) for chat in dialogues]
    rows = [
        (chat.input_ids, chat_labels) for chat, chat_labels in zip(dialogues, labels, strict=True)
    ]
    trainer = _sft_trainer(model, tokenizer, rows, folder / "dialogues", batch_size=BATCH_SIZE)
    _train(trainer, lambda: peaks.append(arm.clock.tick()[1]))
    arm.record_dialogues(dialogues, labels, max(peaks))


def _sft_trainer(
    model: object,
    tokenizer: object,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    folder: Path,
    batch_size: int = 1,
) -> trl.SFTTrainer:
    """Return TRL's trainer for one epoch in order, or with a `batch_size` for two, shuffled."""
    import datasets
    import torch
    import trl

    epochs, sampling = (1, "sequential") if batch_size == 1 else (2, "random")
    return trl.SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows]
        ),
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=epochs * len(rows) // batch_size,
            per_device_train_batch_size=batch_size,
            max_length=max(len(ids) for ids, _ in rows),
            learning_rate=LEARNING_RATE,
            optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            fp16=torch.cuda.is_available() and not torch.cuda.is_bf16_supported(),
            train_sampling_strategy=sampling,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataset_num_proc=1,
            seed=SEED,
        ),
    )


def _train(trainer: transformers.Trainer, on_step: Any) -> None:
    """Train, and call `on_step` when a step has been logged, as the other arm does."""
    import transformers

    class Callback(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                on_step()

    trainer.add_callback(Callback())
    trainer.train()


def main() -> None:
    """Train one arm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    train = train_gatt if options.arm == "gatt" else train_unsloth
    with tempfile.TemporaryDirectory() as folder:
        train(options.model, options.out, QUICK if options.quick else FULL, Path(folder))


if __name__ == "__main__":
    main()
