"""Training with MLX against training with torch. MLX is not among what is installed: `pip install "mlx[cpu]" mlx-lm` runs these.

Unsloth takes MLX on Apple's processors only; a child process says that it is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_trainer import _examples

from pipeline.inference.logits import mean_kl
from pipeline.recipe import Train
from pipeline.training import mlx as backend
from pipeline.training.loss import collate, gatt_loss
from pipeline.training.unsloth import predict

_TRAIN = """
import json, os, platform, sys
import datasets, numpy, psutil, torch, transformers
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
sys.path.insert(0, "tests")
from pathlib import Path
from test_trainer import _examples
from pipeline.training.unsloth import train
from pipeline.recipe import Train
model, out, steps, wanted = sys.argv[1:]
class Cut(Exception): pass
def on_step(step):
    if step.number > int(steps): raise Cut
settings = Train(max_steps=4, batch_size=4, learning_rate=1e-2, save_steps=1, rank=4, dropout=0.1)
try:
    losses, reference = train(Path(model), _examples(), settings, 1, Path(out) / "checkpoints", Path(out) / "adapter", on_step)
    numpy.save(Path(out) / "logits.npy", reference.logits)
    print(json.dumps(losses))
except Cut:
    print(json.dumps(["cut"]))
"""


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_the_rate_is_that_of_transformers(schedule: Any) -> None:
    import torch
    import transformers

    settings = Train(lr_scheduler_type=schedule, max_steps=20, warmup_ratio=0.2, learning_rate=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = transformers.get_scheduler(schedule, optimizer, 4, 20)
    for step in range(20):
        assert backend.rate(settings, step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("more", [{}, {"cross_entropy": 0.3, "temperature": 2.0, "top_k": 9}])
def test_the_loss_is_that_of_torch(
    tiny_llama: Path, tiny_adapter: Path, more: dict[str, Any]
) -> None:
    mx = pytest.importorskip("mlx.core")
    import peft
    import torch
    import transformers
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    settings, rows = (
        Train(loss="distill", rank=4, **more),
        [asdict(example) for example in _examples()],
    )
    batch = collate(rows, 0)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        theirs = gatt_loss(peft.PeftModel.from_pretrained(base, tiny_adapter), batch, settings)
    rotary = json.loads((tiny_llama / "config.json").read_text())[
        "rope_parameters"
    ]  # MLX knows them by their older names
    network, _ = load_model(
        tiny_llama, model_config={"rope_scaling": rotary, "rope_theta": rotary["rope_theta"]}
    )
    network.set_dtype(mx.float32)
    network.freeze()
    linear_to_lora_layers(network, len(network.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0})
    backend._load_adapter(network, tiny_adapter)
    ours = {name: mx.array(tensor.numpy()) for name, tensor in batch.items()}
    weight = sum(sum(row["weights"]) for row in rows)
    found = backend.gatt_loss(network, ours, backend._teacher(network, ours), settings, weight)
    assert float(found) == pytest.approx(float(theirs), rel=1e-4)


def test_it_learns_and_goes_on_as_if_it_had_not_been_cut(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")

    def trained(name: str, steps: int) -> Any:
        command = [
            sys.executable,
            "-c",
            _TRAIN,
            str(tiny_llama),
            str(tmp_path / name),
            str(steps),
            "",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    losses = trained("whole", 4)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert trained("cut", 2) == ["cut"]
    assert trained("cut", 4) == losses
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "cut")
    )
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    # The adapter on the base in float32, by torch: what MLX has in 4 bits is near it, rotary embedding and all.
    exact = predict(
        tiny_llama,
        tmp_path / "whole" / "adapter",
        [e.input_ids for e in _examples()],
        load_in_4bit=False,
    ).logits
    base = predict(tiny_llama, None, [e.input_ids for e in _examples()], load_in_4bit=False).logits
    rounded = np.load(tmp_path / "whole" / "logits.npy")
    assert mean_kl(exact, rounded) < min(0.5, mean_kl(base, rounded))
