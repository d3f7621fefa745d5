"""Training jobs on a tiny random model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import TrainingJob

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

SETTINGS = Train(max_steps=3, batch_size=4, learning_rate=1e-2, save_steps=1, load_in_4bit=True)


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


def tiny_peft_model(model_dir: Path, dtype: str = "float32") -> PeftModel:
    """Return the tiny model with a fresh adapter (in float32), always the same."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert isinstance(model, peft.PeftModel)
    return model


def train_tiny(job: TrainingJob, dtype: str = "float32") -> Trained:
    """Run `train_loop` on a fresh adapter, with the base model in `dtype`."""
    import torch

    from pipeline.training.trainer import train_loop

    model = tiny_peft_model(job.model_dir, dtype)
    losses = train_loop(model, job, pad_token_id=0)
    trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
    return Trained(losses, torch.cat(trained))


def loss_of_full_logits(model: PeftModel, examples: Sequence[TrainingExample]) -> torch.Tensor:
    """Compute the loss of distillation token by token, from the logits of whole chats."""
    import torch

    total, total_weight = torch.zeros(()), 0.0
    for example in examples:
        logprobs = _logprobs(model, example.input_ids)
        with torch.no_grad(), model.disable_adapter():
            teacher_logprobs = _logprobs(model, example.teacher_ids)
        alignment: Mapping[int, int] = dict(example.alignment)
        for index, label in enumerate(example.labels):
            if label == IGNORE_INDEX:
                continue
            q = logprobs[index - 1]
            if index in alignment:
                p = teacher_logprobs[alignment[index] - 1]
                token_loss = (p.exp() * (p - q)).sum()
            else:
                token_loss = -q[label]
            total = total + example.weights[index] * token_loss
            total_weight += example.weights[index]
    return total / total_weight


def _logprobs(model: PeftModel, ids: Sequence[int]) -> torch.Tensor:
    import torch

    return model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)


def train_in_two_processes(training: str, folder: Path) -> Trained:
    """Run lines of Python that train `trained` in two processes of `accelerate launch`."""
    import torch

    script, result = folder / "train.py", folder / "result"
    lines = f"""
import sys
from pathlib import Path
import torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
{training}
torch.save(tuple(trained), {str(result)!r})
"""
    script.write_text(lines, encoding="utf-8")
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Trained(*torch.load(result, weights_only=False))
