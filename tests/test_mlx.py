"""Training with MLX against training with torch.

MLX is not installed by default: `pip install "mlx[cpu]" mlx-lm` enables these tests on Linux.
Unsloth uses MLX on Apple silicon only, so a child process claims to run on it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.families import save_family
from support.training import tiny_examples

from pipeline.errors import GattError
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Train
from pipeline.training import mlx, mlx_loss, mlx_model, unsloth
from pipeline.training.job import TrainingJob
from pipeline.training.loss import collate, gatt_loss

_TRAIN = """
import json, platform, sys
import datasets, numpy, psutil, torch, transformers
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
sys.path.insert(0, "tests")
from dataclasses import replace
from pathlib import Path
from support.training import tiny_job
from pipeline.recipe import Train
from pipeline.training.backend import choose_backend
model_dir, out, last_step = sys.argv[1:]
class Interrupted(Exception): pass
def on_step(step):
    if step.number > int(last_step): raise Interrupted
settings = Train(max_steps=4, batch_size=4, learning_rate=1e-2, save_steps=1, rank=4, dropout=0.1)
try:
    job = replace(tiny_job(Path(model_dir), Path(out), settings), on_step=on_step)
    result = choose_backend().train(job)
    numpy.save(Path(out) / "logits.npy", result.logits.values)
    print(json.dumps(result.losses))
except Interrupted:
    print(json.dumps("interrupted"))
"""


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_the_learning_rate_is_that_of_transformers(schedule: str) -> None:
    import torch
    import transformers

    settings = Train.model_validate(
        {
            "lr_scheduler_type": schedule,
            "max_steps": 20,
            "warmup_ratio": 0.2,
            "learning_rate": 1e-3,
        }
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = transformers.get_scheduler(schedule, optimizer, 4, 20)
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert mlx.learning_rate(settings, step) == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "settings", [Train(dora=True), Train(report_to=("wandb",)), Train(optimizer="adamw_8bit")]
)
def test_settings_that_mlx_lacks_are_an_error(
    settings: Train, tiny_llama: Path, tmp_path: Path
) -> None:
    job = TrainingJob(
        model_dir=tiny_llama,
        examples=tiny_examples(),
        settings=settings,
        seed=1,
        checkpoint_dir=tmp_path,
        adapter_dir=tmp_path,
    )
    with pytest.raises(GattError, match=r"MLX has no train\.dora, no train\.report_to and"):
        mlx.train(job)


@pytest.mark.parametrize(
    "settings",
    [
        Train(loss="distill", rank=4),
        Train(loss="distill", rank=4, cross_entropy=0.3, temperature=2.0, top_k=9),
    ],
)
def test_the_loss_is_that_of_torch(tiny_llama: Path, tiny_adapter: Path, settings: Train) -> None:
    mx = pytest.importorskip("mlx.core")
    import peft
    import torch
    import transformers
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        expected = gatt_loss(
            peft.PeftModel.from_pretrained(base, str(tiny_adapter)),
            collate(tiny_examples(), pad_token_id=0),
            settings,
        )
    config = json.loads((tiny_llama / "config.json").read_text())
    rope = config["rope_parameters"]  # MLX knows these settings by their older names
    model, _ = load_model(
        tiny_llama, model_config={"rope_scaling": rope, "rope_theta": rope["rope_theta"]}
    )
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0})
    mlx_model.load_adapter(model, tiny_adapter)
    batch = mlx_loss.collate(tiny_examples())
    teacher_logits = mlx_loss.teacher_logits(model, batch)
    weight = sum(sum(example.weights) for example in tiny_examples())
    actual = mlx_loss.gatt_loss(model, batch, teacher_logits, settings, weight)
    assert float(actual) == pytest.approx(float(expected), rel=1e-4)


def _train(model_dir: Path, out: Path, last_step: int) -> object:
    """Return the losses of a run in a child process, or "interrupted" after `last_step`."""
    command = [sys.executable, "-c", _TRAIN, str(model_dir), str(out), str(last_step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: object = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("max_length", "factors"), [(64, [1.0, 1.1]), (65, [2.0, 3.0])])
def test_longrope_takes_the_factors_for_the_length(
    key: str, max_length: int, factors: list[float]
) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    config = {key: rope, "original_max_position_embeddings": 64, "hidden_size": 8}
    actual = mlx_model.mlx_config(config, max_length)
    assert actual["rope_scaling"] == {**rope, "type": "longrope", "long_factor": factors}
    assert actual["hidden_size"] == 8 and rope["long_factor"] == [2.0, 3.0]


def test_the_rotary_embedding_of_other_models_keeps_its_settings() -> None:
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert mlx_model.mlx_config(default, 99) == default | {
        "rope_theta": 5e5,
        "rope_scaling": None,
    }
    older = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_theta": 5e5}
    assert mlx_model.mlx_config(older, 99) == older


@pytest.mark.slow
def test_all_projections_of_phi_are_adapted(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    save_family("phi 4 mini", tmp_path / "phi")
    losses = _train(tmp_path / "phi", tmp_path / "out", last_step=4)
    assert isinstance(losses, list) and len(losses) == 4
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    sequences = [example.input_ids for example in tiny_examples()]
    predict = partial(unsloth.predict, tmp_path / "phi", load_in_4bit=False)
    exact = predict(tmp_path / "out" / "adapter", sequences).values
    base, rounded = predict(None, sequences).values, np.load(tmp_path / "out" / "logits.npy")
    assert mean_kl(exact, rounded) < min(0.5, mean_kl(base, rounded))


def test_it_learns_and_an_interrupted_run_resumes_to_the_same_adapter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlx_lm")
    full, resumed = tmp_path / "full", tmp_path / "resumed"
    losses = _train(tiny_llama, full, last_step=4)
    assert isinstance(losses, list) and len(losses) == 4 and losses[-1] < losses[0]
    assert _train(tiny_llama, resumed, last_step=2) == "interrupted"
    assert _train(tiny_llama, resumed, last_step=4) == losses
    expected = load_file(full / "adapter" / "adapter_model.safetensors")
    actual = load_file(resumed / "adapter" / "adapter_model.safetensors")
    assert actual.keys() == expected.keys()
    assert all((actual[name] == expected[name]).all() for name in expected)
    # In torch on the float32 base, the adapter predicts much the same as on MLX's 4 bits: the
    # settings of the rotary embedding have arrived, too.
    sequences = [example.input_ids for example in tiny_examples()]
    exact = unsloth.predict(tiny_llama, full / "adapter", sequences, load_in_4bit=False).values
    base = unsloth.predict(tiny_llama, None, sequences, load_in_4bit=False).values
    rounded = np.load(full / "logits.npy")
    assert mean_kl(exact, rounded) < min(0.5, mean_kl(base, rounded))
