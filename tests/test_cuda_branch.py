"""Unsloth's CUDA branch, run on a CPU: the loss, resuming, adapted layers, lengths and float16.

`support/cuda_branch.py` says what stands in for the card, and computes the results in a process of
its own, because Unsloth changes transformers. What only a card can show is in `test_gpu.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import cuda_branch
from support.families import save_adapter, save_family
from support.training import loss_of_full_logits, tiny_examples

_IMPORTED = (Path(__file__).parent, Path(__file__).parents[1])
pytestmark = pytest.mark.slow  # importing Unsloth takes most of 12 seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models, their adapters, and the results."""
    folder = tmp_path_factory.mktemp("cuda-branch")
    for name, family in {"llama": "llama 3", "gemma": "gemma 2", "phi": "phi 4 mini"}.items():
        save_family(family, folder / name)
    config = folder / "gemma" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"final_logit_softcapping": 2.0}
    config.write_text(json.dumps(settings), encoding="utf-8")
    for name in ("llama", "gemma"):
        save_adapter(folder / name, folder / f"{name}-adapter")
    environment = {
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_COMPILE_DISABLE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"),
    }
    done = subprocess.run(
        [sys.executable, cuda_branch.__file__, str(folder)],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(map(str, _IMPORTED))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def _result(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_loss_and_gradients_are_those_of_plain_transformers(folder: Path, name: str) -> None:
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.float32, attn_implementation="eager"
    )
    adapter = folder / f"{name}-adapter"
    model = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    loss = loss_of_full_logits(model, tiny_examples())
    loss.backward()
    result = _result(folder, name)
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(result["gradients"]) == 2 * 2 * 7  # A and B of 7 projections in 2 layers
    for full_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert result["gradients"][full_name.replace(".default", "")] == pytest.approx(
                parameter.grad.flatten().tolist(), rel=1e-3, abs=1e-6
            )


def test_layers_that_keep_their_activations_have_the_same_gradients(folder: Path) -> None:
    checkpointed, stored = _result(folder, "llama"), _result(folder, "llama stored")
    assert checkpointed["checkpointed"] == [True, True]
    assert stored["checkpointed"] == [True, False]
    # When memory is short after all, the layers are computed again.
    assert checkpointed["discarded"] == [False, True, True]
    assert stored["discarded"] == [True, True, True]
    assert stored["loss"] == checkpointed["loss"]
    assert stored["gradients"] == checkpointed["gradients"]


def test_an_interrupted_run_resumes_to_the_same_adapter(folder: Path) -> None:
    assert _result(folder, "resumed") == _result(folder, "uninterrupted")
    adapters = [
        (folder / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("resumed", "uninterrupted")
    ]
    assert adapters[0] == adapters[1]


def test_a_teachers_chat_may_be_longer_than_max_length(folder: Path) -> None:
    losses = _result(folder, "long teacher")["losses"]
    assert cuda_branch.SETTINGS.max_length < cuda_branch.LONG_TEACHER_TOKENS
    assert len(losses) == 4 and all(0.1 < loss < 10 for loss in losses)


def test_all_projections_of_phi_are_adapted(folder: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(folder / "phi" / "adapter" / "adapter_model.safetensors")
    adapted = {name.split(".layers.0.")[1] for name in weights if ".0." in name}
    moved = [float(abs(matrix).max()) for name, matrix in weights.items() if "lora_B" in name]
    leaves = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert adapted == {f"{leaf}.lora_{side}.weight" for leaf in leaves for side in "AB"}
    assert len(moved) == 8 and min(moved) > 1e-3


def test_a_prediction_is_that_of_plain_transformers(folder: Path) -> None:
    """Neither dropout nor another scale of the rotary embedding changes it."""
    import numpy as np
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(folder / "llama-adapter"))
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([example.input_ids])).logits[0].numpy()
            for example in tiny_examples()[:4]
        ]
    np.testing.assert_allclose(
        _result(folder, "predicted"), np.concatenate(expected), rtol=1e-4, atol=1e-4
    )


def test_float16_trains_as_float32(folder: Path) -> None:
    """Unsloth's fused kernels compute it; they leave the adapter out in the teacher's pass."""
    exact, half = _result(folder, "uninterrupted"), _result(folder, "float16")
    assert half["losses"] == pytest.approx(exact["losses"], rel=2e-3)
    overflowing = _result(folder, "overflowing")
    assert overflowing["losses"] == half["losses"]
    assert 2.0**10 < overflowing["scale"] < 2.0**40
