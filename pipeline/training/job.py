"""What every backend trains with: the job, its batches, its checkpoints, and an orderly stop.

Nothing here needs torch; the loops are in `trainer` (torch) and `mlx`.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.lora.weights import read_adapter
from pipeline.hub.models import shape_of
from pipeline.hub.shape import ModelShape
from pipeline.inference.logits import Logits
from pipeline.recipe import Train
from pipeline.training.examples import TrainingExample

LOGITS_PER_CHUNK = 2**22
"""Logits (tokens times vocabulary) in memory at a time; autograd holds several copies of each."""
_COMPLETE = "complete"
"""Name of the empty file that marks a complete checkpoint."""
PROCESS_TIMEOUT = timedelta(hours=24)
"""How long processes wait for one another: one of them converts the model, and validates."""
_MEGABATCH = 8
"""Batches' worth of dialogues that are sorted by length at a time."""


_REPORTER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of which one is enough, where that of `train.report_to` is not the only one."""
_MIN_PARAMETERS_IN_4BIT = 1e9
"""Of a model that `train.load_in_4bit` = "auto" loads in 4 bits."""


def loads_in_4bit(settings: Train, shape: ModelShape) -> bool:
    """Return whether the base model is in 4 bits while its adapter is trained."""
    if settings.load_in_4bit == "auto":
        return shape.parameters >= _MIN_PARAMETERS_IN_4BIT
    return settings.load_in_4bit


class TokenCounts(NamedTuple):
    """Tokens of the steps so far.

    `computed` counts all that went through the model: the student's chats, the teacher's, and the
    `padding`. `learned` are those with a label and a weight.
    """

    learned: int = 0
    computed: int = 0
    padding: int = 0

    def plus(self, micro_batches: Sequence[Sequence[TrainingExample]]) -> TokenCounts:
        """Return the counts with a further step in its micro-batches."""
        learned, computed, padding = self
        for examples in micro_batches:
            learned += sum(e.learned_tokens for e in examples)
            prefixes = [prefix for e in examples if (prefix := teacher_prefix(e))]
            for chats in ([e.input_ids for e in examples], prefixes):
                lengths = [len(chat) for chat in chats] or [0]
                computed += len(lengths) * max(lengths)
                padding += len(lengths) * max(lengths) - sum(lengths)
        return TokenCounts(learned, computed, padding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A finished optimizer step; `tokens` and `seconds` are totals of all steps so far."""

    number: int
    loss: float
    learning_rate: float
    tokens: TokenCounts
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What to train, and where: the base model in `model_dir`, its adapter to `adapter_dir`.

    On a GPU `stored_layers` layers keep their activations, and the others are computed again in the
    backward pass. On a CPU `dequantize` keeps a base dequantized that is in 4 bits. `on_step` is
    called after each step. `should_stop` is called after each checkpoint with its step and its
    folder, and ends training early.
    """

    model_dir: Path
    examples: Sequence[TrainingExample]
    settings: Train
    seed: int
    checkpoint_dir: Path
    adapter_dir: Path
    stored_layers: int = 0
    logits_per_chunk: int = LOGITS_PER_CHUNK
    dequantize: bool = False
    on_step: Callable[[Step], None] = lambda step: None
    should_stop: Callable[[int, Path], bool] = lambda step, checkpoint: False

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate; the recipe may leave it to the model's width."""
        return self.settings.learning_rate or shape_of(str(self.model_dir)).learning_rate

    @property
    def load_in_4bit(self) -> bool:
        """Return whether the base model is loaded in 4 bits."""
        return loads_in_4bit(self.settings, shape_of(str(self.model_dir)))

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the longest chat, the teacher's included."""
        return max(example.max_tokens for example in self.examples)


def distilled_pairs(example: TrainingExample) -> list[tuple[int, int]]:
    """Return the pairs of `example.alignment` whose token has a weight."""
    return [pair for pair in example.alignment if example.weights[pair[0]]]


def teacher_prefix(example: TrainingExample) -> Sequence[int]:
    """Return the teacher's chat up to its last token that is distilled; it may be empty."""
    pairs = distilled_pairs(example)
    return example.teacher_ids[: 1 + max(index for _, index in pairs)] if pairs else ()


class TrainingResult(NamedTuple):
    """The loss of every step, and the trained model's logits on a few examples."""

    losses: list[float]
    logits: Logits


def length_grouped_batches(job: TrainingJob) -> list[TrainingExample]:
    """Return the dialogues of all steps, one batch after another; each epoch is shuffled anew.

    Dialogues of similar length share a batch, because a batch is padded to its longest one. With
    batches drawn at random, a fifth of what is computed would be padding. Every batch is full:
    dialogues that do not fill one come first in the next epoch.
    """
    rng = random.Random(f"order {job.seed}")
    size, examples = job.settings.batch_size, job.examples
    total = job.settings.max_steps * size
    ordered: list[TrainingExample] = []
    left: list[TrainingExample] = []
    while len(ordered) < total:
        drawn = left + rng.sample(examples, len(examples))
        full = len(drawn) - len(drawn) % size
        epoch, left = drawn[:full], drawn[full:]
        batches: list[list[TrainingExample]] = []
        for start in range(0, len(epoch), _MEGABATCH * size):
            megabatch = epoch[start : start + _MEGABATCH * size]
            megabatch.sort(key=lambda example: len(example.input_ids))
            batches += [megabatch[n : n + size] for n in range(0, len(megabatch), size)]
        rng.shuffle(batches)
        ordered += [example for batch in batches for example in batch]
    return ordered[:total]


def micro_batches(
    examples: Sequence[TrainingExample], max_tokens: int
) -> list[list[TrainingExample]]:
    """Split the dialogues of a step into micro-batches of at most `max_tokens`, padding included.

    A dialogue that is longer is a micro-batch of its own; with 0 there is only one.
    """
    batches: list[list[TrainingExample]] = []
    # Sorted by length, so that each example is the longest of its micro-batch so far.
    for example in sorted(examples, key=lambda e: e.max_tokens):
        if not batches or (max_tokens and (len(batches[-1]) + 1) * example.max_tokens > max_tokens):
            batches.append([])
        batches[-1].append(example)
    return batches


def world_size() -> int:
    """Return the number of processes that share each step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body on the main process first, then on the others (as `accelerate` does)."""
    if world_size() == 1:
        yield
        return
    import accelerate
    import torch

    # The first state sets the timeout of the process group, here and in the Trainer.
    state = accelerate.PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_TIMEOUT)
    with state.main_process_first():
        yield


def from_main_process(*, flag: bool) -> bool:
    """Return the main process's `flag` in each of those that share the steps."""
    if world_size() == 1:
        return flag
    from accelerate.utils import broadcast_object_list

    flags: list[bool] = broadcast_object_list([flag])
    return flags[0]


def last_checkpoint(checkpoint_dir: Path) -> int:
    """Return the step of the last complete checkpoint; 0 if there is none."""
    complete = checkpoint_dir.glob(f"checkpoint-*/{_COMPLETE}")
    return max((checkpoint_step(marker.parent) for marker in complete), default=0)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.split("-")[1])


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete.

    A checkpoint without the marker was interrupted while it was written, and is ignored.
    """
    (checkpoint / _COMPLETE).touch()


def remove_incomplete_checkpoints(checkpoint_dir: Path) -> None:
    """Delete what was interrupted while it was written.

    Otherwise the new checkpoints would be deleted as the oldest: only the last few are kept.
    """
    for checkpoint in checkpoint_dir.glob("checkpoint-*"):
        if not (checkpoint / _COMPLETE).exists():
            shutil.rmtree(checkpoint)


def adapter_weights(folder: Path) -> Path:
    """Return the weights file of a PEFT adapter to start from.

    Raises:
        GattError: there is none.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise GattError(
            f"train.init_adapter: no adapter_model.safetensors in {folder}. Name the folder of a "
            "PEFT LoRA."
        )
    return file


def check_init_adapter(settings: Train, chat_template: str) -> None:
    """Check that the adapter to start from means in this training what it meant in its own.

    Raises:
        GattError: there is none, it cannot be read, or it is more than a LoRA of that strength.
    """
    folder = Path(settings.init_adapter).expanduser()
    adapter = read_adapter(folder)
    if adapter.settings.init != "plain" or adapter.replacements:
        changed = ", ".join(sorted(adapter.replacements)[:3]) or "the base itself"
        raise GattError(
            f"train.init_adapter: {folder} changes {changed} ({adapter.settings.init} LoRA), not "
            "only the matrices that are trained here. Merge it (gatt export --model ... --adapter "
            "... --merged-dir DIR), and take DIR as the model."
        )
    alpha = settings.alpha or settings.rank
    scale = alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    for module, delta in adapter.deltas.items():
        if not math.isclose(delta.scale, scale, rel_tol=1e-6):
            raise GattError(
                f"train.init_adapter: {folder} multiplies B @ A of {module} by {delta.scale:g}, "
                f"and this training by {scale:g}. Set train.alpha, train.rank and train.rslora as "
                "it has them."
            )
    if read_chat_template(folder).strip() not in ("", chat_template.strip()):
        log(
            f"train: {folder} was trained with a chat template of its own. This training uses the "
            "base's."
        )


def require_reporters(settings: Train) -> None:
    """Raise a `GattError` if a package of `train.report_to` is not installed."""
    for name in settings.report_to:
        packages = _REPORTER_PACKAGES.get(name, (name,))
        if not any(map(find_spec, packages)):
            raise GattError(
                f'train.report_to has "{name}", which is not installed. Run `pip install {name}`, '
                "or leave it out."
            )


def nonfinite_loss_error(step: int, loss: float, checkpoint_dir: Path) -> GattError:
    """Return the error for a loss that is NaN or infinite."""
    saved = last_checkpoint(checkpoint_dir)
    checkpoint = f"The checkpoint of step {saved} is kept. " if saved else ""
    return GattError(
        f"The loss of step {step} is {loss}. {checkpoint}Lower train.learning_rate, or start over "
        "with --restart."
    )


def interrupted_error(step: int) -> GattError:
    """Return the error for a stop that the user requested."""
    return GattError(
        f"Stopped after step {step}, which is saved. The same command resumes from there."
    )


class GracefulStop:
    """While it is open, Ctrl-C and SIGTERM request a stop after the step; a second one stops now.

    Signal handlers can be set on the main thread only; elsewhere it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._restore: list[Callable[[], object]] = []

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.signal(number, self._request)
                self._restore.append(partial(signal.signal, number, handler))
        return self

    def __exit__(self, *_: object) -> None:
        for restore in self._restore:
            restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
