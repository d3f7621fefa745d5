"""Training jobs on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import TrainingJob

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

SETTINGS = Train(max_steps=3, batch_size=4, learning_rate=1e-2, save_steps=1)


class Trained(NamedTuple):
    """The loss of every step, and the adapter's weights as one vector."""

    losses: list[float]
    adapter: torch.Tensor


def tiny_examples() -> list[TrainingExample]:
    """Return eight dialogues of different lengths.

    The second half of each is learned, most of it distilled.
    """
    examples: list[TrainingExample] = []
    for n in range(8):
        ids = [(7 * n + 11 * position) % 250 + 3 for position in range(12 + 3 * n)]
        half = len(ids) // 2
        examples.append(
            TrainingExample(
                input_ids=ids,
                labels=[IGNORE_INDEX] * half + ids[half:],
                weights=[0.0] * half + [1.0 + 0.1 * n] * (len(ids) - half),
                teacher_ids=ids[2:],
                alignment=[(index, index - 2) for index in range(half, len(ids) - 3)],
            )
        )
    return examples


def tiny_job(model_dir: Path, out: Path, settings: Train = SETTINGS) -> TrainingJob:
    """Return a job that trains the tiny model and writes below `out`."""
    return TrainingJob(
        model_dir=model_dir,
        examples=tiny_examples(),
        settings=settings,
        seed=1,
        checkpoint_dir=out / "checkpoints",
        adapter_dir=out / "adapter",
    )


def tiny_peft_model(model_dir: Path) -> PeftModel:
    """Return the tiny model with a fresh adapter, always the same."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert isinstance(model, peft.PeftModel)
    return model


def train_tiny(job: TrainingJob) -> Trained:
    """Run `train_loop` on a fresh adapter."""
    import torch

    from pipeline.training.trainer import train_loop

    model = tiny_peft_model(job.model_dir)
    losses = train_loop(model, job, pad_token_id=0)
    trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return Trained(losses, torch.cat(trained))
