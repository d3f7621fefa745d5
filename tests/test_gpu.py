"""What only a CUDA machine can show: training there, with Unsloth's gradient checkpointing.

`scripts/test.py --all` runs it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.training.backend import choose_backend
from pipeline.training.examples import build_example
from pipeline.training.job import Step, TrainingJob
from pipeline.training.memory import training_memory
from pipeline.training.unsloth import load_tokenizer, on_gpu

pytestmark = pytest.mark.gpu

_TEACHER_CHAT: list[Message] = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Light is scattered by the air."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "In the evening its way is longer."},
] * 6
_CHAT: list[Message] = [
    {"role": m["role"], "content": m["content"] if m["role"] == "user" else f"Ahoy! {m['content']}"}
    for m in _TEACHER_CHAT
]


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not on_gpu():
        pytest.skip("needs a GPU")


def _job(settings: Train, folder: Path) -> TrainingJob:
    """Return a job that learns four times the same dialogue."""
    model_dir = cached_checkpoint(find_model("smollm2-135m"))
    example = build_example(load_tokenizer(model_dir), _CHAT, settings, _TEACHER_CHAT)
    return TrainingJob(
        model_dir=model_dir,
        examples=[example] * 4,
        settings=settings,
        seed=1,
        checkpoint_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
    )


_SETTINGS = Train(max_steps=8, batch_size=4, learning_rate=1e-3, save_steps=100)


@pytest.mark.parametrize("objective", ["all_turns", "last_turn", "distill"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_gpu_learns_in_the_predicted_memory(
    objective: str, optimizer: str, tmp_path: Path
) -> None:
    settings = Train.model_validate(
        _SETTINGS.model_dump() | {"loss": objective, "optimizer": optimizer}
    )
    steps: list[Step] = []
    job = replace(_job(settings, tmp_path), on_step=steps.append)
    losses = choose_backend().train(job).losses
    assert losses[-1] < 0.5 * losses[0]
    tokens = settings.batch_size * job.max_tokens
    predicted = training_memory(shape_of("smollm2-135m"), settings, tokens, gpu=True)
    assert steps[-1].peak_memory_bytes < predicted


def test_a_gpu_with_memory_to_spare_learns_the_same(tmp_path: Path) -> None:
    """No layer is computed again, and the logits are in one chunk."""
    job = _job(_SETTINGS, tmp_path / "tight")
    tight = choose_backend().train(job).losses
    roomy = replace(_job(_SETTINGS, tmp_path / "roomy"), stored_layers=30, logits_per_chunk=2**25)
    assert choose_backend().train(roomy).losses == pytest.approx(tight, rel=0.05)
