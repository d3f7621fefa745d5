"""Validation beside training: how often, and what it takes of the GPU."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from support.gpu import install_fake_gpu, sizes_of

from pipeline.files import read_jsonl
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.hub.presets import presets
from pipeline.inference.llama.placement import gpu_bytes
from pipeline.recipe import Recipe
from pipeline.records import Reply
from pipeline.run_dir import RunDir
from pipeline.stages import train as train_stage
from pipeline.training.validation import AdaptableBase, Schedule, validation_gpu_bytes


def _validated(training_seconds: float, validation_seconds: float, checkpoints: int) -> list[int]:
    """Return which checkpoints, from 1, are validated."""
    now = 0.0
    schedule = Schedule(lambda: now)
    validated = []
    for checkpoint in range(1, checkpoints + 1):
        now += training_seconds
        if schedule.is_due():
            with schedule.validation():
                now += validation_seconds
            validated.append(checkpoint)
    return validated


def test_cheap_validations_are_never_left_out() -> None:
    assert _validated(training_seconds=0.1, validation_seconds=20, checkpoints=5) == [1, 2, 3, 4, 5]


def test_validations_within_a_quarter_of_the_training_time_are_not_left_out() -> None:
    assert _validated(training_seconds=400, validation_seconds=99, checkpoints=4) == [1, 2, 3, 4]


def test_long_validations_take_a_quarter_of_the_training_time() -> None:
    """An 8B model on a CPU: two minutes for a validation, and ten steps in half of one."""
    assert _validated(training_seconds=30, validation_seconds=120, checkpoints=48) == [1, 32, 48]


def test_a_long_first_validation_does_not_stop_a_later_one() -> None:
    validated = _validated(training_seconds=100, validation_seconds=200, checkpoints=40)
    assert validated == [1, 16, 24, 32, 40]


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-3b", "llama-3.1-8b"])
def test_the_bytes_on_the_gpu_are_those_of_the_file(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the shape, before there is a file, as the engine counts them once there is one."""
    shape = presets()[name].shape
    assert validation_gpu_bytes(shape, 6) == 0  # this llama.cpp has no GPU
    install_fake_gpu(monkeypatch, 24)
    assert validation_gpu_bytes(shape, 0) == 0
    info = sizes_of(shape, "Q8_0")
    from_file = gpu_bytes(info, info.layers + 1, n_ctx=1064, sequences=6)
    assert validation_gpu_bytes(shape, 6) == pytest.approx(from_file, rel=0.01)


@pytest.mark.parametrize(("vram_gb", "is_beside"), [(24, True), (16, False)])
def test_validation_is_on_the_gpu_if_a_whole_step_fits_beside_it(
    vram_gb: int, is_beside: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Llama 3.1 8B: 8.6 GB of validation beside 8 GB of weights and the tokens of a step."""
    install_fake_gpu(monkeypatch, vram_gb)
    monkeypatch.setattr(train_stage, "on_gpu", lambda: True)
    monkeypatch.setattr(train_stage, "free_memory", lambda: vram_gb * 1e9)
    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"] * 6)
    recipe = Recipe(model="llama-3.1-8b")
    taken = train_stage._validation_gpu_bytes(recipe, RunDir(tmp_path), longest=500)
    assert taken == (validation_gpu_bytes(presets()["llama-3.1-8b"].shape, 6) if is_beside else 0)
    monkeypatch.setattr(train_stage, "on_gpu", lambda: False)
    assert train_stage._validation_gpu_bytes(recipe, RunDir(tmp_path), longest=500) == 0


@pytest.mark.parametrize(("gpu", "layers"), [(True, 3), (False, 0)])
def test_weights_go_where_they_should(
    gpu: bool, layers: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_gpu(monkeypatch, 24)
    file = tmp_path / "tiny.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": file})
    with closing(AdaptableBase(lambda: file, gpu=gpu)) as base:
        assert base.weights.gpu_layers == layers


def test_a_checkpoint_is_left_out_with_a_remark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"])
    monkeypatch.setattr(train_stage, "Validation", _SlowValidation)
    now = iter([0.0, 10.0, 10.0, 105.0, 120.0])
    monkeypatch.setattr(train_stage, "Schedule", lambda: Schedule(lambda: next(now)))
    base = AdaptableBase(lambda: tmp_path, dora=True)
    with closing(train_stage.ValidationHook(Recipe(), RunDir(tmp_path), base)) as hook:
        assert not hook.should_stop(1, tmp_path)
        assert hook.last_note == ", 0 of 0 validation answers adherent at step 1"
        assert not hook.should_stop(2, tmp_path)
        assert hook.last_note == (
            ", no validation at step 2: the last one took 95 s, and a quarter of the time is the "
            "limit"
        )
    assert [row["step"] for _, row in read_jsonl(RunDir(tmp_path).validation)] == [1]


def test_making_the_file_of_the_base_is_not_time_of_a_validation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = [0.0]

    def convert() -> Path:
        seconds[0] += 600
        return tmp_path

    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"])
    monkeypatch.setattr(train_stage, "Validation", _ConvertingValidation)
    monkeypatch.setattr(train_stage, "Schedule", lambda: Schedule(lambda: seconds[0]))
    base = AdaptableBase(convert, dora=True)
    with closing(train_stage.ValidationHook(Recipe(), RunDir(tmp_path), base)) as hook:
        hook.should_stop(1, tmp_path)
        hook.should_stop(2, tmp_path)
    assert seconds == [600]
    assert [row["step"] for _, row in read_jsonl(RunDir(tmp_path).validation)] == [1, 2]


class _ConvertingValidation:
    """Stands in for `Validation`: it needs the file of the base, and has no answers."""

    def __init__(self, base: AdaptableBase, *_: object) -> None:
        """Keep the base."""
        self._base = base

    def measure(self, checkpoint: Path) -> list[Reply]:
        """Return no replies."""
        assert self._base.file
        return []


class _SlowValidation:
    """Stands in for `Validation`: no answers."""

    def __init__(self, *_: object) -> None:
        """Accept anything."""

    def measure(self, checkpoint: Path) -> list[Reply]:
        """Return no replies."""
        return []
