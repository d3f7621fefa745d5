"""4-bit QLoRA through Unsloth, the same code on CUDA and CPU. Labels are ours."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from pipeline.backends.objective import Labelled, learned_loss, padded
from pipeline.config import Train
from pipeline.errors import GattError
from pipeline.files import whole_file

_COMPLETE = "complete"
_PREDICTED_TOKENS, _PREDICTED_SEQUENCES = 96, 4


def on_gpu() -> bool:
    """Whether training runs on a CUDA (or ROCm) device."""
    import torch

    return bool(torch.cuda.is_available())


def try_four_bits(device: str) -> str:
    """What of Unsloth works here: a matrix is really quantised to NF4 on `device` and back."""
    import torch

    try:
        from bitsandbytes import functional

        matrix = torch.rand(64, 64, device=device)
        restored = functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4"))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"installed, but 4-bit weights fail on {device}: {error}"
    return f"works on {device} with 4-bit weights (mean error of NF4 {(restored - matrix).abs().mean():.3f} of 1)"


@cache
def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def in_order(examples: Sequence[Labelled], settings: Train, seed: int) -> list[Labelled]:
    """The dialogues of all steps, one batch after another, each epoch anew; dialogues of like length share a batch.

    A batch is padded to its longest dialogue: drawn at random, a fifth of what is computed would be padding.
    """
    rng = random.Random(f"order {seed}")
    rows: list[Labelled] = []
    while len(rows) < settings.steps * settings.batch:
        epoch = rng.sample(examples, len(examples))
        batches: list[list[Labelled]] = []
        for start in range(0, len(epoch), 8 * settings.batch):
            alike = sorted(epoch[start : start + 8 * settings.batch], key=lambda e: len(e.input_ids))
            batches += [alike[n : n + settings.batch] for n in range(0, len(alike), settings.batch)]
        rng.shuffle(batches)
        rows += [row for batch in batches if len(batch) == settings.batch or len(epoch) < settings.batch for row in batch]
    return rows[: settings.steps * settings.batch]


def last_checkpoint(checkpoints: Path) -> int:
    """The step of the last whole checkpoint; 0 where there is none."""
    return max((int(c.parent.name.split("-")[1]) for c in checkpoints.glob(f"checkpoint-*/{_COMPLETE}")), default=0)


def _unsloth() -> Any:
    """Unsloth's loader; it must be imported before transformers."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(platformdirs.user_cache_dir("gatt")) / "unsloth"))
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the base is on this disk
    warnings.filterwarnings("ignore")
    from unsloth import FastLanguageModel  # isort: skip
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return FastLanguageModel


class Stop:
    """While it is open, Ctrl-C and SIGTERM only ask to stop at the end of the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(
    folder: Path, examples: Sequence[Labelled], settings: Train, seed: int, checkpoints: Path, adapter: Path,
    on_step: Callable[[int, float], None],
) -> tuple[list[float], Reference]:  # fmt: skip
    """Train an adapter on the base in `folder` and save it; goes on from the last whole checkpoint.

    Returns:
        The loss of every step, and what the trained model predicts.
    """
    FastLanguageModel = _unsloth()
    import torch
    import transformers

    network, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=settings.max_length, load_in_4bit=True, local_files_only=True
    )
    network = FastLanguageModel.get_peft_model(
        network, r=settings.rank, lora_alpha=settings.alpha or settings.rank, lora_dropout=settings.dropout,
        target_modules=list(settings.targets), random_state=seed, use_rslora=settings.rslora,
        use_gradient_checkpointing=False if not torch.cuda.is_available() else "unsloth",
    )  # fmt: skip

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(state.global_step, logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stop.asked:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Written last: a checkpoint without it was cut off.
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    class Weighted(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            loss = learned_loss(model, inputs)
            if not torch.isfinite(loss):
                raise GattError(
                    f"The loss of step {self.state.global_step + 1} is {float(loss)}. The checkpoint of step "
                    f"{last_checkpoint(checkpoints)} is kept. Lower train.learning_rate, or begin anew with --restart."
                )
            return loss

    trainer = Weighted(
        model=network,
        args=transformers.TrainingArguments(
            output_dir=str(checkpoints), max_steps=settings.steps, per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate, lr_scheduler_type=settings.schedule, weight_decay=settings.weight_decay,
            warmup_steps=max(1, int(settings.steps * settings.warmup)), seed=seed, data_seed=seed, logging_steps=1,
            save_steps=settings.save_steps, save_total_limit=2, report_to="none", disable_tqdm=True, remove_unused_columns=False,
            train_sampling_strategy="sequential",
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(), dataloader_pin_memory=False,
        ),
        train_dataset=[asdict(e) for e in in_order(examples, settings, seed)],
        data_collator=lambda rows: padded(rows, tokenizer.pad_token_id or 0),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    step = last_checkpoint(checkpoints)
    with Stop() as stop:
        trainer.train(resume_from_checkpoint=str(checkpoints / f"checkpoint-{step}") if step else None)
    if stop.asked and trainer.state.global_step < settings.steps:
        raise GattError(f"Stopped after step {trainer.state.global_step}, which is saved. The same command goes on from there.")
    network.save_pretrained(adapter)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, _predict(network, [e.input_ids for e in examples])


class Reference(NamedTuple):
    """What a model predicts: sequences of token ids, and (all their tokens, vocabulary) logits of what follows each."""

    sequences: list[list[int]]
    logits: Any

    def save(self, path: Path) -> None:
        """Keep it as NumPy arrays; the logits in half precision."""
        import numpy as np

        with whole_file(path) as draft, draft.open("wb") as file:
            lengths = [len(s) for s in self.sequences]
            np.savez(file, ids=np.concatenate(self.sequences), lengths=lengths, logits=self.logits.astype(np.float16))

    @classmethod
    def load(cls, path: Path) -> Reference:
        """As saved."""
        import numpy as np

        with np.load(path) as found:
            ends = np.cumsum(found["lengths"])[:-1]
            return cls([part.tolist() for part in np.split(found["ids"], ends)], found["logits"].astype(np.float32))


def predict(folder: Path, adapter: Path | None, sequences: Sequence[Sequence[int]], four_bits: bool) -> Reference:
    """What the base in `folder` with `adapter` on it predicts, in 4 bits as in training, or in float32 as it is."""
    if four_bits:
        network, _ = _unsloth().from_pretrained(str(folder), max_seq_length=4096, load_in_4bit=True, local_files_only=True)
    else:
        import transformers

        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    if adapter:
        import peft

        network = peft.PeftModel.from_pretrained(network, str(adapter))
    return _predict(network, sequences)


def _predict(network: Any, sequences: Sequence[Sequence[int]]) -> Reference:
    """The first tokens of the first few sequences are enough to compare models by."""
    import numpy as np
    import torch

    device = next(network.parameters()).device
    heads = [list(s[:_PREDICTED_TOKENS]) for s in sequences[:_PREDICTED_SEQUENCES]]
    with torch.no_grad():
        rows = [network(input_ids=torch.tensor([s], device=device)).logits[0].float().cpu().numpy() for s in heads]
    return Reference(heads, np.concatenate(rows))


def four_bits(matrix: Any) -> Any:
    """A matrix (outputs, inputs) as 4-bit training has it: rounded to NF4 and back, float32 in and out."""
    import torch
    from bitsandbytes import functional

    device = "cuda" if on_gpu() else "cpu"
    torch.set_num_threads(1)  # the merge has threads of its own
    stored, state = functional.quantize_4bit(
        torch.from_numpy(matrix).to(device, torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return functional.dequantize_4bit(stored, state).float().cpu().numpy()
