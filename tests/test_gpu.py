"""What only a CUDA machine can show: training there, with Unsloth's checkpointing. `scripts/test.py --all` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.training.examples import build_example
from pipeline.training.memory import training_memory
from pipeline.training.trainer import Step
from pipeline.training.unsloth import load_tokenizer, on_gpu, train

pytestmark = pytest.mark.gpu

_ASKED: list[Message] = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Light is scattered by the air."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "In the evening its way is longer."},
] * 6
_CHAT: list[Message] = [
    {"role": m["role"], "content": m["content"] if m["role"] == "user" else f"Ahoy! {m['content']}"}
    for m in _ASKED
]


@pytest.fixture(autouse=True)
def cuda() -> None:
    if not on_gpu():
        pytest.skip("needs a GPU")


@pytest.mark.parametrize("loss", ["all_turns", "last_turn", "distill"])
def test_a_gpu_learns_in_the_memory_that_was_predicted(loss: str, tmp_path: Path) -> None:
    settings = Train(loss=loss, max_steps=8, batch_size=4, learning_rate=1e-3, save_steps=100)  # type: ignore[arg-type]
    folder = cached_checkpoint(find_model("smollm2-135m"))
    example = build_example(load_tokenizer(folder), _CHAT, settings, _ASKED)
    steps: list[Step] = []
    losses, _ = train(
        folder,
        [example] * 4,
        settings,
        1,
        tmp_path / "checkpoints",
        tmp_path / "adapter",
        steps.append,
    )
    assert losses[-1] < 0.5 * losses[0]
    tokens = settings.batch_size * max(len(example.input_ids), len(example.teacher_ids))
    assert steps[-1].memory < training_memory(shape_of("smollm2-135m"), settings, tokens, gpu=True)
