"""The training loop on torch: a `transformers.Trainer` with GAtt's loss, split into micro-batches.

This module imports torch and transformers. Import it where training runs, after Unsloth, which
patches transformers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
import transformers
from peft.helpers import disable_input_dtype_casting

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.system import is_main_process, peak_memory, trim_heap, trim_memory
from pipeline.training.examples import TrainingExample
from pipeline.training.job import (
    PROCESS_TIMEOUT,
    GracefulStop,
    Step,
    TokenCounts,
    TrainingJob,
    interrupted_error,
    last_checkpoint,
    length_grouped_batches,
    mark_complete,
    micro_batches,
    nonfinite_loss_error,
    remove_incomplete_checkpoints,
    world_size,
)
from pipeline.training.loss import GattLoss, collate

if TYPE_CHECKING:
    from peft import PeftModel

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}
"""The optimizers of the recipe, as transformers calls them."""
_HALF_PRECISION = (torch.bfloat16, torch.float16)
_FIRST_LOSS_SCALE = 2.0**16
"""What a loss is multiplied by in float16 at first, as in `torch.amp.GradScaler`."""
_LOSS_SCALE_FILE = "loss_scale.json"
_TRIM_STEPS = 8
"""Steps of many lengths fragment the heap. Trimming it takes a tenth of a second, and the next step
half a second more."""


class Inputs(TypedDict):
    """The examples that this process computes."""

    examples: list[TrainingExample]


def train_loop(model: PeftModel, job: TrainingJob, pad_token_id: int) -> list[float]:
    """Train the adapter of `model` and return the loss of every step.

    Training resumes from the last complete checkpoint. Several processes, as started by
    `accelerate launch`, share the dialogues of each step.

    Raises:
        GattError: the loss is not finite, memory is short even for one dialogue, the processes
            cannot share a batch, or the user stopped it.
    """
    settings = job.settings
    if settings.batch_size % world_size():
        raise GattError(
            f"{world_size()} processes cannot share train.batch_size = {settings.batch_size} "
            "dialogues evenly. Set it to a multiple of the processes."
        )
    stop = GracefulStop()
    trainer = GattTrainer(model, job, pad_token_id, stop)
    if trainer.args.world_size != world_size():  # each process would train on the same dialogues
        raise GattError(
            f"WORLD_SIZE is {world_size()}, but transformers counts {trainer.args.world_size}. "
            "Start the processes with `accelerate launch` (on CPUs: `accelerate launch --cpu`)."
        )
    if is_main_process():
        remove_incomplete_checkpoints(job.checkpoint_dir)
    step = last_checkpoint(job.checkpoint_dir)
    checkpoint = str(job.checkpoint_dir / f"checkpoint-{step}") if step else None
    if checkpoint:
        trainer.load_loss_scale(Path(checkpoint))
    model.train()
    with stop, _half_precision_adapter(model):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.requested and trainer.state.global_step < settings.max_steps:
        raise interrupted_error(trainer.state.global_step)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


class GattTrainer(transformers.Trainer):  # type: ignore[misc]
    """Train with `GattLoss`, each step in micro-batches that fit in memory.

    `max_tokens` is the limit of a micro-batch, 0 for none; it is halved when memory is short.
    `loss_scale` multiplies the loss in the backward pass: gradients in float16 would underflow. It
    is halved when they overflow, and the step is computed again.
    """

    def __init__(
        self, model: PeftModel, job: TrainingJob, pad_token_id: int, stop: GracefulStop
    ) -> None:
        super().__init__(
            model=model,
            args=_training_arguments(job),
            train_dataset=length_grouped_batches(job),
            data_collator=_collect,
        )
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(GattCallback(self, job, stop))
        self.max_tokens = job.settings.max_tokens_per_micro_batch
        self.tokens = TokenCounts()
        self.seconds = 0.0
        self.loss_scale = _FIRST_LOSS_SCALE if model.dtype == torch.float16 else 1.0
        self._job, self._pad_token_id = job, pad_token_id
        self._loss = GattLoss(model, job.settings, job.logits_per_chunk)
        self._adapter = [p for p in model.parameters() if p.requires_grad]

    def training_step(
        self, model: torch.nn.Module, inputs: Inputs, num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """Return the loss of a step, its gradients summed over micro-batches and processes.

        `model` may be wrapped for several processes. The sums are taken here instead, so
        `self.model` is used, which is never wrapped.
        """
        start = time.monotonic()
        examples = inputs["examples"]
        weight = torch.tensor(sum(sum(e.weights) for e in examples), device=self.model.device)
        all_reduce_sum(weight)
        loss = self._forward_backward(examples, weight)
        while self.loss_scale > 1 and torch.isfinite(loss) and self._overflowed():
            self.loss_scale /= 2
            self.model.zero_grad()
            loss = self._forward_backward(examples, weight)
        if self.loss_scale > 1:
            torch._foreach_div_(self._gradients(), self.loss_scale)
        if not torch.isfinite(loss):
            raise nonfinite_loss_error(
                self.state.global_step + 1, float(loss), self._job.checkpoint_dir
            )
        self.tokens = self.tokens.plus(micro_batches(examples, self.max_tokens))
        self.seconds += time.monotonic() - start
        return loss

    def load_loss_scale(self, checkpoint: Path) -> None:
        """Continue with the scale of a checkpoint."""
        file = checkpoint / _LOSS_SCALE_FILE
        if file.is_file():
            self.loss_scale = float(json.loads(file.read_text(encoding="utf-8")))

    def save_loss_scale(self, checkpoint: Path) -> None:
        """Add the scale to a checkpoint, if there is one."""
        if self.loss_scale > 1:
            write_json(checkpoint / _LOSS_SCALE_FILE, self.loss_scale)

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._adapter if p.grad is not None]

    def _overflowed(self) -> bool:
        """Return whether a gradient is infinite or NaN."""
        norms = torch.stack([gradient.norm() for gradient in self._gradients()])
        return not bool(norms.isfinite().all())

    def _forward_backward(
        self, examples: Sequence[TrainingExample], total_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a step, and sum its gradients over micro-batches and processes."""
        loss = self._try_forward_backward(examples, total_weight)
        for gradient in self._gradients():
            all_reduce_sum(gradient)
        return all_reduce_sum(loss)

    def _try_forward_backward(
        self, examples: Sequence[TrainingExample], total_weight: torch.Tensor
    ) -> torch.Tensor:
        """Run forward and backward; try smaller micro-batches if memory is short."""
        while True:
            try:
                return self._accumulate(examples, total_weight)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve_micro_batches(examples, error)
                self.model.zero_grad()  # what the interrupted attempt has accumulated

    def _accumulate(
        self, examples: Sequence[TrainingExample], total_weight: torch.Tensor
    ) -> torch.Tensor:
        """Run forward and backward on each micro-batch, and return the sum of their losses."""
        device = self.model.device
        loss = torch.zeros((), device=device)
        for micro_batch in micro_batches(examples, self.max_tokens):
            batch = collate(micro_batch, self._pad_token_id, device)
            with _autocast(self.model):
                part = self._loss(batch, total_weight / self.loss_scale)
            self.accelerator.backward(part)
            loss += part.detach()
        return loss / self.loss_scale

    def _halve_micro_batches(self, examples: Sequence[TrainingExample], error: Exception) -> None:
        """Halve the limit of a micro-batch, or compute all layers again in the backward pass.

        Raises:
            GattError: each micro-batch is one dialogue already.
        """
        batches = micro_batches(examples, self.max_tokens)
        longest = batches[-1][-1].max_tokens
        if len(batches) == len(examples):
            if _discard_activations(self.model):
                log("train: out of memory; continuing without stored activations")
                return
            raise GattError(
                f"Too little memory to train on a dialogue of {longest} tokens. Lower "
                "train.max_length or dialogues.turns, close other programs, or take a smaller "
                "model."
            ) from error
        # The last example of a micro-batch is its longest, to which the others are padded.
        self.max_tokens = max(len(batch) * batch[-1].max_tokens for batch in batches) // 2
        log(f"train: out of memory; continuing with at most {self.max_tokens} tokens at a time")


class GattCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Report steps, mark complete checkpoints, and stop when a signal or the job requests it."""

    def __init__(self, trainer: GattTrainer, job: TrainingJob, stop: GracefulStop) -> None:
        self._trainer, self._job, self._stop = trainer, job, stop

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        """Report a step. The summary at the end of training has no loss of a step."""
        if "loss" not in logs:
            return
        cuda = torch.cuda.is_available()
        step = Step(
            number=state.global_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            tokens=self._trainer.tokens,
            seconds=self._trainer.seconds,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else peak_memory(),
        )
        self._job.on_step(step)

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: object,
    ) -> None:
        """Stop on a signal, after a checkpoint."""
        # Signals do not reach all processes in the same step.
        self._stop.requested = any_rank(flag=self._stop.requested, device=args.device)
        if self._stop.requested:
            control.should_save = control.should_training_stop = True
        if state.global_step % _TRIM_STEPS == 0:
            trim_heap()

    def on_save(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: object,
    ) -> None:
        """Mark the checkpoint as complete, and ask the job whether to stop here."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if is_main_process():
            self._trainer.save_loss_scale(checkpoint)
            mark_complete(checkpoint)
        # A signal that has reached one process since the step ended counts for all.
        if not any_rank(flag=self._stop.requested, device=args.device):
            stop = self._job.should_stop(state.global_step, checkpoint)
            if any_rank(flag=stop, device=args.device):
                control.should_training_stop = True
        trim_memory()


def _collect(examples: list[TrainingExample]) -> Inputs:
    return {"examples": examples}


def _training_arguments(job: TrainingJob) -> transformers.TrainingArguments:
    settings = job.settings
    return transformers.TrainingArguments(
        output_dir=str(job.checkpoint_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size // world_size(),
        optim=_OPTIMIZERS[settings.optimizer],
        learning_rate=job.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        warmup_steps=max(1, int(settings.max_steps * settings.warmup_ratio)),
        seed=job.seed,
        data_seed=job.seed,
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=2,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=list(settings.report_to) or "none",
        train_sampling_strategy="sequential",  # `length_grouped_batches` has the order
        dataloader_pin_memory=False,
        ddp_timeout=int(PROCESS_TIMEOUT.total_seconds()),
    )


def _half_precision_adapter(model: PeftModel) -> AbstractContextManager[None]:
    """On 16-bit weights, compute the adapter in 16 bits too; it is stored in float32.

    By default PEFT casts the input of each adapter matrix to float32, and all of these copies would
    be saved for the backward pass.
    """
    is_half = model.dtype in _HALF_PRECISION
    return disable_input_dtype_casting(model) if is_half else nullcontext()


def _autocast(model: PeftModel) -> AbstractContextManager[None]:
    """Return the context of a micro-batch; with it ends the cache of the adapter's 16-bit copy."""
    is_half = model.dtype in _HALF_PRECISION
    return torch.autocast(model.device.type, model.dtype) if is_half else nullcontext()


def _discard_activations(model: PeftModel) -> bool:
    """Undo Unsloth's `checkpoint_skip_layers`; return whether a layer stored its activations."""
    mark = "_unsloth_skip_checkpoint"
    return any([module.__dict__.pop(mark, False) for module in model.modules()])


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` summed over all processes, in place: each has a share of the dialogues."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def any_rank(*, flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is set in any process; all wait for the slowest."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)))


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was short; on a CPU, torch raises a plain RuntimeError."""
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)
