"""What training takes in memory is told before it begins. The prediction itself is measured by scripts/bench/memory.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib
from conftest import Gatt

from pipeline.errors import GattError
from pipeline.hub.models import presets, shape_of
from pipeline.hub.shape import ModelShape
from pipeline.recipe import Recipe, Train
from pipeline.stages import train
from pipeline.training.memory import tokens_that_fit, training_memory


def test_a_models_sizes_are_the_same_from_every_source(base: Path, tiny_llama: Path) -> None:
    assert (
        shape_of(str(base))
        == shape_of("smollm2-135m")
        == ModelShape(30, 576, 1536, 576, 192, 49152, True)
    )
    import peft
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    shape = shape_of(str(tiny_llama))
    norms = sum(p.numel() for name, p in network.named_parameters() if "norm" in name)
    assert shape.parameters + norms == network.num_parameters()
    settings = Train(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))
    adapter = peft.get_peft_model(
        network, peft.LoraConfig(r=4, target_modules=list(settings.target_modules))
    )
    assert shape.adapter(settings) == sum(
        p.numel() for p in adapter.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gemma-3-1b", 1.0), ("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19), ("mistral-7b", 7.25)],
)
def test_the_sizes_of_a_preset_make_its_published_number_of_parameters(
    name: str, billions: float
) -> None:
    assert shape_of(name).parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_fits_is_what_was_predicted() -> None:
    for name in presets():
        shape = shape_of(name)
        for gpu in (False, True):
            tokens = tokens_that_fit(shape, Train(), 12e9, gpu)
            if tokens > 0:
                assert (
                    training_memory(shape, Train(), tokens, gpu)
                    <= 12e9
                    < training_memory(shape, Train(), tokens + 1, gpu)
                )


def test_doctor_tells_what_a_model_takes(gatt: Gatt, tiny_llama: Path) -> None:
    done = gatt("doctor", "--model", "qwen3-1.7b")
    assert done.returncode == 0, done.stderr
    assert "qwen3-1.7b             1.72 B" in done.stdout and "8 GB" in done.stdout
    everything = gatt("doctor").stdout
    assert all(name in everything for name in presets())
    assert "The largest that can be trained on this" in everything
    unknown = gatt("doctor", "--model", "qwen3-1.8b")
    assert unknown.returncode == 1 and "Did you mean 'qwen3-1.7b'?" in unknown.stderr


def test_a_recipe_for_a_card(gatt: Gatt, tmp_path: Path) -> None:
    models = {}
    for card in (8, 24):
        done = gatt("init", tmp_path / f"{card}.toml", "--card", card)
        assert done.returncode == 0, done.stderr
        models[card] = tomllib.loads((tmp_path / f"{card}.toml").read_text())["model"]
    assert shape_of(models[8]).parameters < shape_of(models[24]).parameters
    small = gatt("init", tmp_path / "1.toml", "--card", 1)
    assert small.returncode == 1 and "Expected 8, 12, 16 or 24 GB" in small.stderr


def test_a_step_is_cut_to_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shape = Recipe(), shape_of("smollm2-135m")
    for free, tokens in ((64e9, 0), (training_memory(shape, recipe.train, 700), 700)):
        monkeypatch.setattr(train, "free_memory", lambda free=free: free)
        assert train.fitting(recipe, 500).max_tokens_per_micro_batch == pytest.approx(tokens, abs=1)
    monkeypatch.setattr(train, "free_memory", lambda: training_memory(shape, recipe.train, 400))
    with pytest.raises(
        GattError,
        match=r"Too little memory to train smollm2-135m: \d\.\d GB needed for a dialogue of 500 tokens",
    ):
        train.fitting(recipe, 500)
