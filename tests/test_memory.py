"""The memory that training takes is known before it starts.

How good the prediction is, is measured by scripts/bench/memory.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
from support.cli import call_gatt

from pipeline import system
from pipeline.errors import GattError
from pipeline.hub.models import shape_of
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Recipe, Train
from pipeline.recipe_file import load_recipe
from pipeline.stages import doctor
from pipeline.training import memory, mlx
from pipeline.training.job import LOGITS_PER_CHUNK, loads_in_4bit
from pipeline.training.memory import (
    GPU_SIZES_GB,
    TOKENS_PER_STEP,
    TrainingPlan,
    fit_to_memory,
    largest_preset,
    tokens_that_fit,
    training_memory,
    usable_bytes,
)

FOUR_DIALOGUES = Train(batch_size=4, load_in_4bit=True)
SMOLLM2 = ModelShape(
    num_hidden_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    q_size=576,
    kv_size=192,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def test_the_shape_of_a_model_is_the_same_from_every_source(base: Path) -> None:
    assert shape_of(str(base)) == shape_of("smollm2-135m") == SMOLLM2


def test_parameters_are_counted_as_torch_counts_them(tiny_llama: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    shape = shape_of(str(tiny_llama))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.parameters + norms == model.num_parameters()
    settings = Train(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))
    config = peft.LoraConfig(r=4, target_modules=list(settings.target_modules))
    trained = [
        p.numel() for p in peft.get_peft_model(model, config).parameters() if p.requires_grad
    ]
    assert shape.adapter_parameters(settings) == sum(trained)


_PUBLISHED = {
    "gemma-4-e2b": 4.59,
    "gemma-4-e4b": 7.38,
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.88,
    "granite-3.3-2b": 2.53,
    "granite-3.3-8b": 8.17,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "ministral-3-14b": 13.51,
    "ministral-3-3b": 3.43,
    "mistral-7b": 7.25,
    "olmo-3-7b": 7.30,
    "phi-4-mini": 3.84,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3.5-4b": 4.20,
    "qwen3.5-9b": 8.95,
    "smollm2-1.7b": 1.711,
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm3-3b": 3.08,
}
"""Billions of parameters, of multimodal models those of the text model.

Published are 3.4 and 13.5 for the language models of Ministral 3, 8.0 for all of gemma-4-e4b.
"""


@pytest.mark.parametrize("name", presets())
def test_the_shape_of_a_preset_has_its_published_parameters(name: str) -> None:
    assert shape_of(name).parameters / 1e9 == pytest.approx(_PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", presets())
def test_as_many_tokens_fit_as_the_prediction_allows(name: str, gpu: bool) -> None:
    shape, settings = shape_of(name), Train()
    tokens = tokens_that_fit(shape, settings, 12e9, gpu=gpu)
    if tokens > 0:
        assert training_memory(shape, settings, tokens, gpu=gpu) <= 12e9
        assert training_memory(shape, settings, tokens + 1, gpu=gpu) > 12e9
    else:
        assert training_memory(shape, settings, 1, gpu=gpu) > 12e9


def test_dora_and_validation_take_more_memory() -> None:
    plain = training_memory(SMOLLM2, Train(), 500, validation=False)
    dora = training_memory(SMOLLM2, Train(dora=True), 500, validation=False)
    assert dora - plain == pytest.approx(12 * SMOLLM2.projection_parameters)
    assert training_memory(SMOLLM2, Train(), 500) - plain > SMOLLM2.parameters


def test_a_larger_gpu_trains_a_larger_preset() -> None:
    names = [
        largest_preset(usable_bytes(size), TOKENS_PER_STEP, Train(), gpu=True)
        for size in GPU_SIZES_GB
    ]
    sizes = [shape_of(name).parameters for name in names]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert largest_preset(1e6, TOKENS_PER_STEP, Train(), gpu=True) == ""


def test_doctor_shows_what_a_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "speed_text", lambda *_: "")  # tested in test_cpu_training.py
    shown = call_gatt("doctor", "--model", "qwen3-1.7b")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^qwen3-1.7b +1\.72 B .* 6 GB ", shown.stdout, re.MULTILINE)
    unknown = call_gatt("doctor", "--model", "qwen3-1.8b")
    assert unknown.returncode == 1 and "Did you mean 'qwen3-1.7b'?" in unknown.stderr


def test_doctor_shows_all_presets() -> None:
    everything = call_gatt("doctor").stdout
    assert all(name in everything for name in presets())
    assert "Largest model that this" in everything


def test_a_recipe_for_a_graphics_card(tmp_path: Path) -> None:
    models: dict[int, str] = {}
    for size in (6, 8, 12, 16, 24):
        file = tmp_path / f"{size}.toml"
        done = call_gatt("init", file, "--vram", size)
        assert done.returncode == 0, done.stderr
        models[size] = tomllib.loads(file.read_text())["model"]
        preset = presets()[models[size]]
        needed = training_memory(preset.shape, Train(), TOKENS_PER_STEP, gpu=True)
        assert needed <= usable_bytes(size)
        assert f"{models[size]} ({preset.repository}, " in done.stdout
        assert f"{needed / 1e9:.1f} of the {usable_bytes(size) / 1e9:.1f} GB" in done.stdout
    assert models == {
        6: "qwen3.5-4b",
        8: "granite-3.3-8b",
        12: "qwen3.5-9b",
        **dict.fromkeys((16, 24), "ministral-3-14b"),
    }
    assert "License apache-2.0, 262,144 tokens of context, it does not think." in done.stdout
    small = call_gatt("init", tmp_path / "1.toml", "--vram", 1)
    assert small.returncode == 1 and "Try 6, 8, 12, 16 or 24 GB" in small.stderr


def test_a_step_is_split_to_fit_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(train=FOUR_DIALOGUES)
    assert fit_to_memory(recipe, 200, 64e9, gpu=False) == TrainingPlan(
        recipe.train, dequantize=True
    )
    long = fit_to_memory(recipe, 500, 64e9, gpu=False).settings
    assert long.max_tokens_per_micro_batch == 1024  # more at a time are no faster on a CPU
    longer = fit_to_memory(recipe, 1500, 64e9, gpu=False).settings
    assert longer.max_tokens_per_micro_batch == 1500
    chosen = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"max_tokens_per_micro_batch": 1900})}
    )
    assert fit_to_memory(chosen, 500, 64e9, gpu=False).settings == chosen.train
    free = training_memory(SMOLLM2, recipe.train, 700)
    settings = fit_to_memory(recipe, 500, free, gpu=False).settings
    assert settings.max_tokens_per_micro_batch == pytest.approx(700, abs=1)
    assert f"{settings.max_tokens_per_micro_batch} tokens at a time" in capsys.readouterr().err
    with pytest.raises(
        GattError,
        match=r"memory to train smollm2-135m: \d\.\d GB needed for a dialogue of 500 tokens",
    ):
        fit_to_memory(recipe, 500, training_memory(SMOLLM2, recipe.train, 400), gpu=False)


def test_cached_files_do_not_count_as_used_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["anon 150000", "inactive_file 600000", "active_file 200000", "shmem 50000"]
    files = {"memory.max": "1000000\n", "memory.current": "999000\n"}
    for name, text in (files | {"memory.stat": "\n".join(rows)}).items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(system, "_CGROUP", tmp_path)
    assert system.available_memory() == 801_000
    system.require_memory(800e3, "load a model")
    (tmp_path / "memory.max").write_text("max\n")
    assert system.available_memory() > 10e6


@pytest.mark.parametrize("bfloat16", [True, False])
def test_spare_memory_of_a_cpu_keeps_the_base_dequantized(
    bfloat16: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "has_bfloat16", lambda: bfloat16)
    recipe = Recipe(train=FOUR_DIALOGUES)
    needed = training_memory(SMOLLM2, recipe.train, 800)
    dequantized = (2 if bfloat16 else 4) * SMOLLM2.projection_parameters
    plan = fit_to_memory(recipe, 200, 1.3 * (needed + dequantized), gpu=False)
    assert plan.dequantize
    assert f"about {(needed + dequantized) / 1e9:.1f} GB of" in capsys.readouterr().err
    assert not fit_to_memory(recipe, 200, needed + dequantized, gpu=False).dequantize
    dora = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dora": True})})
    assert not fit_to_memory(dora, 200, 64e9, gpu=False).dequantize


def test_a_cpu_without_bfloat16_takes_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(*, bfloat16: bool, gpu: bool = False) -> float:
        monkeypatch.setattr(memory, "has_bfloat16", lambda: bfloat16)
        return training_memory(SMOLLM2, Train(), 1000, gpu=gpu)

    assert predict(bfloat16=False) > 1.4 * predict(bfloat16=True)
    assert predict(bfloat16=False, gpu=True) == predict(bfloat16=True, gpu=True)
    monkeypatch.setattr(mlx, "available", lambda: True)  # which computes in 16 bits
    assert predict(bfloat16=False) == predict(bfloat16=True)


def test_a_small_model_is_trained_in_16_bits_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "has_bfloat16", lambda: True)
    small, large = SMOLLM2, shape_of("qwen3-1.7b")
    assert not loads_in_4bit(Train(), small) and loads_in_4bit(Train(), large)
    assert loads_in_4bit(Train(load_in_4bit=True), small)
    assert not loads_in_4bit(Train(load_in_4bit=False), large)
    saved = training_memory(small, Train(), 500) - training_memory(
        small, Train(load_in_4bit=True), 500
    )
    assert saved == pytest.approx((2 - 0.516) * small.projection_parameters)
    assert not fit_to_memory(Recipe(), 500, 64e9, gpu=False).dequantize  # there is one copy
    with pytest.raises(GattError, match=r"'maybe': Input should be 'auto', True or False"):
        load_recipe(None, ("train.load_in_4bit=maybe",))


def test_processes_on_a_cpu_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(train=FOUR_DIALOGUES)
    free = training_memory(SMOLLM2, recipe.train, 700)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GattError, match="Too little memory"):
        fit_to_memory(recipe, 500, free, gpu=False)
    settings = fit_to_memory(recipe, 500, 2 * free, gpu=False).settings
    assert settings.max_tokens_per_micro_batch == pytest.approx(700, abs=1)


@pytest.mark.parametrize(("card_gib", "tokens"), [(8, 2972), (12, 21848), (16, 40724), (24, 78475)])
def test_an_8b_model_takes_on_a_gpu_what_unsloth_publishes(card_gib: int, tokens: int) -> None:
    """The table of Unsloth's documentation: Llama 3.1 8B, rank 32, the longest context by card."""
    shape, card = shape_of("llama-3.1-8b"), card_gib * 2**30
    for optimizer, distance in (("adamw", 0.04), ("adamw_8bit", 0.05)):
        settings = Train.model_validate({"optimizer": optimizer, "rank": 32})
        predicted = training_memory(shape, settings, tokens, gpu=True)
        assert predicted == pytest.approx(card, rel=distance)
    if card_gib > 8:
        assert tokens_that_fit(shape, Train(), card, gpu=True) == pytest.approx(tokens, rel=0.06)


def _plan_bytes(shape: ModelShape, plan: TrainingPlan, tokens: int) -> float:
    """Count what a plan takes on a GPU: the prediction, stored activations, larger chunks."""
    activations = plan.stored_layers * tokens * shape.activation_bytes_per_token(2)
    logits = 40 * (plan.logits_per_chunk - LOGITS_PER_CHUNK)
    return training_memory(shape, plan.settings, tokens, gpu=True) + activations + logits


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b", "qwen3-4b", "llama-3.1-8b"])
@pytest.mark.parametrize("card_gb", [6, 8, 12, 24])
def test_the_plan_for_a_gpu_fits(
    name: str, card_gb: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(model=name, train=FOUR_DIALOGUES)
    free, shape = usable_bytes(card_gb), shape_of(name)
    needed = training_memory(shape, recipe.train, 600, gpu=True)
    if needed > free:
        with pytest.raises(GattError, match=r'set train\.optimizer = "adamw_8bit"'):
            fit_to_memory(recipe, 600, free, gpu=True)
        return
    plan = fit_to_memory(recipe, 600, free, gpu=True)
    tokens = plan.settings.max_tokens_per_micro_batch or 4 * 600
    assert tokens >= 600 and plan.stored_layers <= shape.num_hidden_layers
    taken = _plan_bytes(shape, plan, tokens)
    assert taken <= free
    if plan.stored_layers:
        assert taken <= 0.9 * free
    assert f"about {taken / 1e9:.1f} GB of {free / 1e9:.1f} (estimated)" in capsys.readouterr().err


def test_spare_memory_of_a_gpu_is_used() -> None:
    """Layers keep their activations and chunks grow with the card, all of them if it is large."""
    recipe = Recipe(model="llama-3.1-8b", train=FOUR_DIALOGUES)
    plans = [fit_to_memory(recipe, 500, usable_bytes(size), gpu=True) for size in (12, 16, 24, 80)]
    stored = [plan.stored_layers for plan in plans]
    assert stored == sorted(stored) and 0 < stored[0] < 8 and stored[-1] == 32
    assert [plan.logits_per_chunk for plan in plans] == [2**24, 2**25, 2**25, 2**26]
    # The model of the validation takes its part first.
    taken = fit_to_memory(recipe, 500, usable_bytes(24), gpu=True, taken_bytes=9e9)
    assert taken.stored_layers < plans[2].stored_layers
