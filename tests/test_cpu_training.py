"""Training on a CPU: faster projections with the same numbers, flat memory, estimated speed.

Real sizes are measured by scripts/bench/memory.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from support.cli import call_gatt

from pipeline.hub.models import shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Train
from pipeline.stages import doctor
from pipeline.training import unsloth
from pipeline.training.cpu import precision
from pipeline.training.cpu.projections import speed_up_projections
from pipeline.training.cpu.speed import StepTime, attention_heads, estimate_step


def _model(
    alpha: int,
    *,
    dora: bool = False,
    bias: bool = False,
    in_4bit: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> peft.PeftModel:
    """Return two projections in a row, with a LoRA that is not zero."""
    from bitsandbytes.nn.modules import Linear4bit as Base

    torch.manual_seed(1)
    base = torch.nn.Sequential()
    for name, inputs, outputs in (("up", 64, 128), ("down", 128, 64)):
        linear = torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)
        if in_4bit:
            quantized = Base(inputs, outputs, bias, dtype)  # type: ignore[no-untyped-call]
            quantized.load_state_dict(linear.state_dict())
            linear = quantized.to("cpu")
        base.add_module(name, linear)
    base.is_loaded_in_4bit = in_4bit
    config = peft.LoraConfig(
        r=8, lora_alpha=alpha, target_modules=["up", "down"], use_dora=dora, init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    assert isinstance(model, peft.PeftModel)
    model.train()
    return model


def _outputs_and_gradients(model: peft.PeftModel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the outputs with and without adapter, and the gradients, as training computes them."""
    torch.manual_seed(2)
    inputs = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    layers = [m for m in model.modules() if isinstance(m, Linear4bit | Linear)]
    is_half = dtype is not torch.float32
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_half)
    with disable_input_dtype_casting(model) if is_half else nullcontext(), autocast:
        with torch.no_grad():
            for layer in layers:
                layer._disable_adapters = True
            base = model(inputs)
            for layer in layers:
                layer._disable_adapters = False
        outputs = model(inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    outputs.float().square().sum().backward()
    assert inputs.grad is not None
    return [base, outputs.detach(), inputs.grad, *(p.grad for p in trained if p.grad is not None)]


@pytest.mark.parametrize(("in_4bit", "dequantize"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(("alpha", "bias"), [(8, False), (20, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_faster_projections_give_the_same_bits(
    in_4bit: bool, dequantize: bool, alpha: int, bias: bool, dtype: torch.dtype
) -> None:
    expected = _outputs_and_gradients(_model(alpha, bias=bias, in_4bit=in_4bit, dtype=dtype), dtype)
    model = _model(alpha, bias=bias, in_4bit=in_4bit, dtype=dtype)
    speed_up_projections(model, dequantize=dequantize)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit | Linear)]
    assert len(layers) == 2 and all("forward" in vars(layer) for layer in layers)
    actual = _outputs_and_gradients(model, dtype)
    assert not torch.equal(expected[0], expected[1]) and len(expected) == 7
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_projections_that_train_no_longer_are_left_to_their_library() -> None:
    inputs = torch.randn(1, 3, 64).bfloat16()
    plain, fast = _model(8), _model(8)
    speed_up_projections(fast, dequantize=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.eval()(inputs), plain.eval()(inputs))


def test_dora_keeps_the_forward_pass_of_peft() -> None:
    model = _model(8, dora=True)
    speed_up_projections(model, dequantize=True)
    assert not any("forward" in vars(m) for m in model.modules() if isinstance(m, Linear4bit))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True}, torch.float32),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "has_bfloat16", precision.has_bfloat16.__wrapped__)
    assert unsloth.training_dtype() is dtype


@pytest.mark.slow
def test_unsloth_would_choose_the_same_format() -> None:
    unsloth.load_unsloth()
    from unsloth_zoo.cpu.runtime import cpu_bf16_supported

    assert precision.has_bfloat16() == cpu_bf16_supported()


def test_the_time_of_a_step_grows_with_the_model_and_the_batch() -> None:
    small = ModelShape(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        q_size=64,
        kv_size=32,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    step = estimate_step(small, Train(batch_size=1, rank=4))
    assert step.learned_tokens == 250 and step.product_seconds > 0
    deep = replace(small, num_hidden_layers=40)
    assert estimate_step(deep, Train(batch_size=2, rank=4)).seconds > 10 * step.seconds


@pytest.mark.parametrize("name", presets())
def test_the_timed_layers_have_nearly_the_heads_of_every_preset(name: str) -> None:
    shape = shape_of(name)
    head_dim, heads, kv_heads = attention_heads(shape)
    assert heads % kv_heads == 0
    assert head_dim * heads == pytest.approx(shape.q_size, rel=0.15)
    assert head_dim * kv_heads == pytest.approx(shape.kv_size, rel=0.15)


@pytest.mark.slow
def test_doctor_says_how_fast_a_model_trains_and_generates() -> None:
    shown = call_gatt("doctor", "--model", "smollm2-135m")
    assert shown.returncode == 0, shown.stderr
    training = re.search(
        r"training +([\d.]+) s a step \((\d+) dialogues .* (\d+) learned tokens/s", shown.stdout
    )
    assert training and 0.3 < float(training[1]) < 300
    learned = 250 * int(training[2])
    assert int(training[3]) == pytest.approx(learned / float(training[1]), rel=0.1, abs=1)
    generation = re.search(r"generation +(\d+) tokens/s, 12 dialogues", shown.stdout)
    assert generation and int(generation[1]) > 10


def test_doctor_times_no_model_that_would_have_to_be_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "estimate_step", lambda *_: StepTime(8.0, 2.0, 1000))
    text = doctor.speed_text("qwen3-8b", Train(batch_size=4))
    assert "8.0 s a step (4 dialogues of 500 tokens), 125 learned tokens/s. 25% are" in text
    assert text.endswith("gatt doctor --model FILE.gguf")


_STEPS = """
import json, sys, tempfile
from pathlib import Path
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Train
from pipeline.training.examples import TrainingExample
from pipeline.training.job import TrainingJob
from pipeline.training.unsloth import train

peaks, examples = [], []
for n in range(64):  # each of another length, but every fourth is the longest
    ids = [(7 * n + 11 * place) % 20000 + 5 for place in range(260 if n % 4 == 0 else 60 + 3 * n)]
    examples.append(TrainingExample(input_ids=ids, labels=ids, weights=[1.0] * len(ids)))
with tempfile.TemporaryDirectory() as name:
    train(TrainingJob(
        model_dir=cached_checkpoint(find_model("smollm2-135m")),
        examples=examples,
        settings=Train(loss="all_turns", max_steps=64, batch_size=1, rank=8, save_steps=1000),
        seed=1,
        checkpoint_dir=Path(name),
        adapter_dir=Path(name, "adapter"),
        on_step=lambda step: peaks.append(step.peak_memory_bytes),
    ))
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the heap of glibc")
def test_memory_does_not_grow_with_the_steps() -> None:
    """Kernels compiled for every length, and a fragmented heap, would take 20 MB more each step."""
    done = subprocess.run([sys.executable, "-c", _STEPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == 64
    assert peaks[-1] <= 1.05 * peaks[9]
