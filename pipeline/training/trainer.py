"""The loop around the loss: dialogues in order, parts of a step that fit, checkpoints, an orderly stop."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.recipe import Train
from pipeline.system import is_main_process, peak_memory, trim_memory
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.loss import collate, gatt_loss

_COMPLETE = "complete"


class Step(NamedTuple):
    """A step that is done. `learned` are the tokens of all steps so far that were learned, `computed` all that were computed,
    padding and the teacher's chats with them, of which `padding` were nothing; in `seconds`. `memory` in bytes is the peak.
    """

    number: int
    loss: float
    learning_rate: float
    learned: int
    computed: int
    padding: int
    seconds: float
    memory: int


class TokenCounts(NamedTuple):
    """Tokens of the steps so far, as in `Step`."""

    learned: int = 0
    computed: int = 0
    padding: int = 0

    def plus(self, split: Sequence[Sequence[dict[str, Any]]]) -> TokenCounts:
        """With those of a step in its parts."""
        learned, computed, padding = self
        for part in split:
            learned += sum(token != IGNORE_INDEX for row in part for token in row["labels"])
            for key in ("input_ids", "asked_ids"):
                lengths = [len(row[key]) for row in part]
                computed += len(part) * max(lengths)
                padding += len(part) * max(lengths) - sum(lengths)
        return TokenCounts(learned, computed, padding)


def length_grouped_batches(
    examples: Sequence[TrainingExample], settings: Train, seed: int
) -> list[TrainingExample]:
    """The dialogues of all steps, one batch after another, each epoch anew; dialogues of like length share a batch.

    A batch is padded to its longest dialogue: drawn at random, a fifth of what is computed would be padding.
    """
    rng = random.Random(f"order {seed}")
    rows: list[TrainingExample] = []
    while len(rows) < settings.max_steps * settings.batch_size:
        epoch = rng.sample(examples, len(examples))
        batches: list[list[TrainingExample]] = []
        for start in range(0, len(epoch), 8 * settings.batch_size):
            alike = sorted(
                epoch[start : start + 8 * settings.batch_size], key=lambda e: len(e.input_ids)
            )
            batches += [
                alike[n : n + settings.batch_size]
                for n in range(0, len(alike), settings.batch_size)
            ]
        rng.shuffle(batches)
        rows += [
            row
            for batch in batches
            if len(batch) == settings.batch_size or len(epoch) < settings.batch_size
            for row in batch
        ]
    return rows[: settings.max_steps * settings.batch_size]


def world_size() -> int:
    """How many share each step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def main_process_first() -> Iterator[None]:
    """What is in it the leading process does alone, and then the others."""
    if world_size() == 1:
        yield
        return
    import accelerate
    import torch

    with accelerate.PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield


def last_checkpoint(checkpoints: Path) -> int:
    """The step of the last whole checkpoint; 0 where there is none."""
    return max(
        (int(c.parent.name.split("-")[1]) for c in checkpoints.glob(f"checkpoint-*/{_COMPLETE}")),
        default=0,
    )


def mark_complete(checkpoint: Path) -> None:
    """Say so, last of all: one that does not was cut off."""
    (checkpoint / _COMPLETE).touch()


def nonfinite_loss_error(step: int, loss: float, checkpoints: Path) -> GattError:
    """The loss is NaN or infinity."""
    return GattError(
        f"The loss of step {step} is {loss}. The checkpoint of step {last_checkpoint(checkpoints)} is kept. Lower "
        "train.learning_rate, or begin anew with --restart."
    )


def interrupted_error(step: int) -> GattError:
    """The user has stopped it."""
    return GattError(
        f"Stopped after step {step}, which is saved. The same command goes on from there."
    )


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter to go on from.

    Raises:
        GattError: there is none.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise GattError(
            f"train.init_adapter: no adapter_model.safetensors in {folder}. Name the folder of a PEFT LoRA."
        )
    return file


class GracefulStop:
    """While it is open, Ctrl-C and SIGTERM only ask to stop at the end of the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._ask)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def micro_batches(rows: Sequence[dict[str, Any]], tokens: int) -> list[list[dict[str, Any]]]:
    """The dialogues of a step in parts of at most `tokens` each, padding included, or of one dialogue; 0 is one part."""
    found: list[list[dict[str, Any]]] = []
    # Short ones first: the next is always the longest of its part.
    for row in sorted(rows, key=_length):
        if not found or (tokens and (len(found[-1]) + 1) * _length(row) > tokens):
            found.append([])
        found[-1].append(row)
    return found


def _length(row: dict[str, Any]) -> int:
    return max(len(row["input_ids"]), len(row["asked_ids"]))


def train_loop(
    network: Any,
    pad: int,
    examples: Sequence[TrainingExample],
    settings: Train,
    seed: int,
    checkpoints: Path,
    on_step: Callable[[Step], None],
    enough: Callable[[int, Path], bool] = lambda step, folder: False,
) -> list[float]:
    """Train the adapter of `network`; goes on from the last whole checkpoint. Returns the loss of every step.

    At each checkpoint `enough` is asked with the step and the folder of the adapter whether to stop there. Several processes, as
    `accelerate launch` starts them, share the dialogues of each step.

    Raises:
        GattError: the loss is no number, memory is short even for one dialogue, or the user has stopped it.
    """
    import torch
    import transformers

    if settings.batch_size % world_size():
        raise GattError(
            f"{world_size()} processes cannot share train.batch_size = {settings.batch_size} dialogues a step evenly."
        )

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(
                    Step(
                        state.global_step,
                        logs["loss"],
                        logs["learning_rate"],
                        *trainer.counted,
                        *trainer.spent(),
                    )
                )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Signals do not reach all processes in the same step.
            stop.asked = _any_rank(stop.asked, network.device)
            if stop.asked:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if is_main_process():
                mark_complete(folder)
            if not stop.asked and _any_rank(enough(state.global_step, folder), network.device):
                control.should_training_stop = True
            trim_memory()  # steps of many lengths leave holes: after 70 the process would have twice the memory of a few

    class Weighted(transformers.Trainer):  # type: ignore[misc]
        budget = settings.max_tokens_per_micro_batch
        counted = TokenCounts()
        seconds = 0.0

        def spent(self) -> tuple[float, int]:
            """Seconds in steps, and bytes at the peak."""
            return (
                self.seconds,
                torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory(),
            )

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            """The loss of a step, its gradients summed over its parts and over all processes."""
            rows, start = inputs["rows"], time.monotonic()
            weight = _all_reduce_sum(
                torch.tensor(sum(sum(row["weights"]) for row in rows), device=network.device)
            )
            while True:
                try:
                    total = self._in_parts(rows, weight)
                    break
                except (MemoryError, RuntimeError) as error:
                    split = micro_batches(rows, self.budget)
                    if not _is_out_of_memory(error):
                        raise
                    if len(split) == len(rows):
                        raise GattError(
                            f"Too little memory to train on a dialogue of {_length(split[-1][0])} tokens. Lower train.max_length "
                            "or dialogues.turns, close other programs, or take a smaller model."
                        ) from error
                    network.zero_grad()
                    self.budget = max(len(part) * _length(part[-1]) for part in split) // 2
                    log(
                        f"train: out of memory; going on with at most {self.budget} tokens at a time"
                    )
            for parameter in network.parameters():
                if parameter.grad is not None:
                    _all_reduce_sum(parameter.grad)
            total = _all_reduce_sum(total)
            if not torch.isfinite(total):
                raise nonfinite_loss_error(self.state.global_step + 1, float(total), checkpoints)
            self.counted = self.counted.plus(micro_batches(rows, self.budget))
            self.seconds += time.monotonic() - start
            return total

        def _in_parts(self, rows: Sequence[dict[str, Any]], weight: Any) -> Any:
            network.train()
            total = torch.zeros((), device=network.device)
            for part in micro_batches(rows, self.budget):
                batch = {
                    name: tensor.to(network.device) for name, tensor in collate(part, pad).items()
                }
                with _mixed(network):
                    loss = gatt_loss(network, batch, settings, weight)
                self.accelerator.backward(loss)
                total += loss.detach()
            return total

    trainer = Weighted(
        model=network,
        args=transformers.TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size // world_size(),
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler_type,
            weight_decay=settings.weight_decay,
            warmup_steps=max(1, int(settings.max_steps * settings.warmup_ratio)),
            seed=seed,
            data_seed=seed,
            logging_steps=1,
            save_steps=settings.save_steps,
            save_total_limit=2,
            disable_tqdm=True,
            remove_unused_columns=False,
            report_to=list(settings.report_to) or "none",
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
        ),
        train_dataset=[asdict(e) for e in length_grouped_batches(examples, settings, seed)],
        data_collator=lambda rows: {"rows": rows},
        callbacks=[Watch()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    step = last_checkpoint(checkpoints)
    with GracefulStop() as stop:
        trainer.train(
            resume_from_checkpoint=str(checkpoints / f"checkpoint-{step}") if step else None
        )
    if stop.asked and trainer.state.global_step < settings.max_steps:
        raise interrupted_error(trainer.state.global_step)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@contextmanager
def _mixed(network: Any) -> Iterator[None]:
    """On weights in bfloat16 the adapter computes in that, too, and is kept in float32.

    PEFT would hand each of the adapter's matrices a float32 copy of its input, and all of these are kept for the way back.
    """
    import peft.helpers
    import torch

    if network.dtype != torch.bfloat16:
        yield
        return
    with (
        torch.autocast(network.device.type, torch.bfloat16),
        peft.helpers.disable_input_dtype_casting(network),
    ):
        yield


def _all_reduce_sum(tensor: Any) -> Any:
    """The sum over all processes, in place: each has a share of the dialogues."""
    import torch

    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def _any_rank(said: bool, device: Any) -> bool:
    """Whether it is said in any process; all wait for the slowest."""
    import torch

    return bool(_all_reduce_sum(torch.tensor(float(said), device=device)))


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)
