"""What only a CUDA machine can show: training there, with Unsloth's gradient checkpointing.

`scripts/test.py --all` runs it.
"""

from __future__ import annotations

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


@pytest.mark.parametrize("objective", ["all_turns", "last_turn", "distill"])
def test_a_gpu_learns_in_the_predicted_memory(objective: str, tmp_path: Path) -> None:
    settings = Train.model_validate(
        {
            "loss": objective,
            "max_steps": 8,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "save_steps": 100,
        }
    )
    model_dir = cached_checkpoint(find_model("smollm2-135m"))
    example = build_example(load_tokenizer(model_dir), _CHAT, settings, _TEACHER_CHAT)
    steps: list[Step] = []
    job = TrainingJob(
        model_dir=model_dir,
        examples=[example] * 4,
        settings=settings,
        seed=1,
        checkpoint_dir=tmp_path / "checkpoints",
        adapter_dir=tmp_path / "adapter",
        on_step=steps.append,
    )
    losses = choose_backend().train(job).losses
    assert losses[-1] < 0.5 * losses[0]
    predicted = training_memory(
        shape_of("smollm2-135m"), settings, settings.batch_size * example.max_tokens, gpu=True
    )
    assert steps[-1].peak_memory_bytes < predicted
