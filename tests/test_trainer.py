"""The training loop on a tiny random model: micro-batches, short memory, processes, resuming."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from peft import PeftModel
from support.training import (
    SETTINGS,
    Trained,
    tiny_examples,
    tiny_job,
    tiny_peft_model,
    train_in_two_processes,
    train_tiny,
)

from pipeline.errors import GattError
from pipeline.export import verify
from pipeline.files import read_jsonl
from pipeline.gguf.formats import uniform_format
from pipeline.gguf.merge import plan_merge, write
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Recipe, Train
from pipeline.records import Message, Reply
from pipeline.run_dir import RunDir
from pipeline.stages import train as train_stage
from pipeline.training import mlx, trainer, unsloth
from pipeline.training.backend import choose_backend
from pipeline.training.examples import TrainingExample, build_example, replay_chats
from pipeline.training.job import (
    GracefulStop,
    Step,
    TokenCounts,
    TrainingJob,
    last_checkpoint,
    length_grouped_batches,
    main_process_first,
    mark_complete,
    micro_batches,
)
from pipeline.training.loss import Batch, GattLoss
from pipeline.training.projections import own_projections
from pipeline.training.validation import AdaptableBase

MICRO_BATCH_SETTINGS = SETTINGS.model_copy(update={"max_tokens_per_micro_batch": 40})


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train three steps, each in one pass."""
    return train_tiny(tiny_job(tiny_llama, tmp_path_factory.mktemp("uninterrupted")))


def _assert_same(actual: Trained, expected: Trained, tolerance: float = 1e-5) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
    assert actual.adapter.tolist() == pytest.approx(expected.adapter.tolist(), abs=tolerance)


def test_a_step_in_micro_batches_is_the_same_step(
    tiny_llama: Path,
    tmp_path: Path,
    uninterrupted: Trained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[Sequence[int]] = []

    class RecordedLoss(GattLoss):
        def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
            shapes.append(tuple(batch["input_ids"].shape))
            return super().__call__(batch, total_weight)

    monkeypatch.setattr(trainer, "GattLoss", RecordedLoss)
    _assert_same(train_tiny(tiny_job(tiny_llama, tmp_path, MICRO_BATCH_SETTINGS)), uninterrupted)
    assert len(shapes) > SETTINGS.max_steps
    assert all(rows == 1 or rows * length <= 40 for rows, length in shapes)


def test_out_of_memory_continues_in_smaller_micro_batches(
    tiny_llama: Path,
    tmp_path: Path,
    uninterrupted: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[int] = []

    class ShortOfMemory(GattLoss):
        def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
            rows.append(len(batch["input_ids"]))
            loss = super().__call__(batch, total_weight)
            if batch["input_ids"].numel() > 60:
                loss.backward()  # the gradients of an interrupted step must not count
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
                )
            return loss

    monkeypatch.setattr(trainer, "GattLoss", ShortOfMemory)
    _assert_same(train_tiny(tiny_job(tiny_llama, tmp_path)), uninterrupted)
    assert rows[0] == 4 and rows[-1] < 4
    assert "out of memory; continuing with at most" in capsys.readouterr().err


def test_one_dialogue_that_does_not_fit_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(GattLoss, "__call__", out_of_memory)
    with pytest.raises(GattError, match=r"Too little memory to train on a dialogue of \d+ tokens"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_stored_activations_are_given_up_before_a_dialogue(
    tiny_llama: Path,
    tmp_path: Path,
    uninterrupted: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layers: list[torch.nn.Module] = []

    class ShortOfMemory(GattLoss):
        def __init__(self, model: PeftModel, settings: Train, logits_per_chunk: int) -> None:
            super().__init__(model, settings, logits_per_chunk)
            layers.append(model.get_base_model().model.layers[1])
            layers[0].__dict__["_unsloth_skip_checkpoint"] = True  # as Unsloth marks it

        def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
            if "_unsloth_skip_checkpoint" in layers[0].__dict__:
                raise torch.OutOfMemoryError
            return super().__call__(batch, total_weight)

    monkeypatch.setattr(trainer, "GattLoss", ShortOfMemory)
    settings = SETTINGS.model_copy(update={"max_tokens_per_micro_batch": 12})
    _assert_same(train_tiny(tiny_job(tiny_llama, tmp_path, settings)), uninterrupted)
    assert "continuing without stored activations" in capsys.readouterr().err


def test_other_errors_are_raised(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> NoReturn:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(GattLoss, "__call__", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_a_loss_that_is_not_finite_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Infinite(GattLoss):
        def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
            return super().__call__(batch, total_weight) * torch.inf

    monkeypatch.setattr(trainer, "GattLoss", Infinite)
    with pytest.raises(GattError, match=r"The loss of step 1 is (inf|nan)\. Lower train\.learn"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


@pytest.mark.parametrize("first_scale", [pytest.param(2.0**16, marks=pytest.mark.slow), 2.0**40])
def test_float16_is_scaled_until_no_gradient_overflows(
    first_scale: float,
    tiny_llama: Path,
    tmp_path: Path,
    uninterrupted: Trained,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "_FIRST_LOSS_SCALE", first_scale)
    job = tiny_job(tiny_llama, tmp_path)
    trained = train_tiny(job, "float16")
    _assert_same(trained, uninterrupted, tolerance=0.03)
    scales = [
        json.loads((job.checkpoint_dir / f"checkpoint-{step}" / "loss_scale.json").read_text())
        for step in (2, 3)  # the last two are kept
    ]
    assert 2.0**10 < scales[0] <= min(first_scale, 2.0**30) and scales[1] <= scales[0]
    # An interrupted run goes on with the scale that it had.
    shutil.rmtree(job.checkpoint_dir / "checkpoint-3")
    monkeypatch.setattr(trainer, "_FIRST_LOSS_SCALE", 1.0)
    _assert_same(train_tiny(job, "float16"), trained, tolerance=1e-6)
    last = job.checkpoint_dir / "checkpoint-3" / "loss_scale.json"
    assert json.loads(last.read_text()) == scales[1]


def test_small_gradients_do_not_vanish_in_float16(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that the model knows has no gradient; its weight makes the others' small."""
    known = tiny_examples()[3]  # the longest: both chats' batches have one shape, and round alike
    known = replace(
        known,
        weights=[1e6 * weight for weight in known.weights],
        teacher_ids=known.input_ids,
        alignment=[(n, n) for n in range(1, len(known.input_ids))],
    )
    settings = SETTINGS.model_copy(update={"max_steps": 2})
    job = replace(
        tiny_job(tiny_llama, tmp_path / "a", settings), examples=[*tiny_examples()[:3], known]
    )
    expected = train_tiny(job)  # the first step is the warm-up, with a learning rate of zero
    scaled = train_tiny(replace(job, checkpoint_dir=tmp_path / "b"), "float16")
    monkeypatch.setattr(trainer, "_FIRST_LOSS_SCALE", 1.0)
    unscaled = train_tiny(replace(job, checkpoint_dir=tmp_path / "c"), "float16")
    moved, too_little = (
        float((trained.adapter - unscaled.adapter).norm()) for trained in (expected, scaled)
    )
    assert moved > 0.1
    assert too_little == pytest.approx(moved, rel=0.1)
    assert float((scaled.adapter - expected.adapter).norm()) < 0.2 * moved


def test_adamw_in_8_bits_learns_and_resumes(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    class InterruptedTestError(Exception):
        pass

    def interrupt(step: Step) -> None:
        if step.number == 3:
            raise InterruptedTestError

    settings = SETTINGS.model_copy(update={"optimizer": "adamw_8bit"})
    expected = train_tiny(tiny_job(tiny_llama, tmp_path / "a", settings))
    assert expected.losses == pytest.approx(uninterrupted.losses, rel=0.02)
    assert expected.adapter.tolist() != uninterrupted.adapter.tolist()
    job = tiny_job(tiny_llama, tmp_path / "b", settings)
    with pytest.raises(InterruptedTestError):
        train_tiny(replace(job, on_step=interrupt))
    _assert_same(train_tiny(job), expected, tolerance=1e-6)


def test_the_learning_rate_falls_with_the_width_of_the_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rates = [shape_of(name).learning_rate for name in ("smollm2-135m", "llama-3.1-8b")]
    assert rates == [8e-4, pytest.approx(1.73e-4, rel=1e-3)]
    job = tiny_job(tiny_llama, tmp_path, Train(max_steps=2, batch_size=4, save_steps=9))
    steps: list[Step] = []
    train_tiny(replace(job, on_step=steps.append))  # the warm-up is one step
    assert steps[1].learning_rate == job.learning_rate == shape_of(str(tiny_llama)).learning_rate
    assert replace(job, settings=SETTINGS).learning_rate == 1e-2


@pytest.mark.parametrize(
    ("wanted", "linear_layers", "own"),
    [
        (("q_proj", "up_proj"), {"q_proj", "k_proj", "up_proj"}, ["q_proj", "up_proj"]),
        (
            Train().target_modules,
            {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
            ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        ),
        (("up_proj", "v_proj"), {"qkv_proj", "gate_up_proj"}, ["gate_up_proj", "qkv_proj"]),
        (("q_proj",), {"q_proj", "qkv_proj"}, ["q_proj"]),
        # Layers of several kinds: LFM2's short convolutions, Qwen3.5's linear attention.
        (
            ("q_proj", "o_proj", "gate_proj", "down_proj"),
            {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
            ["q_proj", "in_proj", "out_proj", "w1", "w2"],
        ),
        (
            ("q_proj", "v_proj", "o_proj"),
            {*Train().target_modules, *(f"in_proj_{end}" for end in ("qkv", "z", "a", "b"))}
            | {"out_proj"},
            ["q_proj", "in_proj_qkv", "in_proj_z", "v_proj", "o_proj", "out_proj"],
        ),
        # Of all seven: what another family has in their place, but never its routers.
        (Train().target_modules, {"query_key_value", "dense"}, ["dense", "query_key_value"]),
        (
            Train().target_modules,
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate"},
            ["k_proj", "o_proj", "q_proj", "v_proj"],
        ),
    ],
)
def test_fused_projections_stand_for_their_parts(
    wanted: tuple[str, ...], linear_layers: set[str], own: list[str]
) -> None:
    assert own_projections(wanted, linear_layers) == own


def test_a_projection_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(GattError) as caught:
        own_projections(("q_proj", "up_proj"), {"q_proj", "k_proj", "v_proj", "o_proj", "gate"})
    assert str(caught.value) == (
        "train.target_modules: the model has no linear layer for up_proj. It has gate, k_proj, "
        "o_proj, q_proj, v_proj. Leave out what is missing."
    )


@pytest.mark.parametrize(
    ("student", "teacher", "positions", "length"),
    [(700, 900, 4096, 900), (900, 700, 900, 900), (100, 90, 4096, 512), (100, 90, 256, 256)],
)
def test_unsloth_gets_the_length_of_the_longest_chat(
    student: int, teacher: int, positions: int, length: int, tmp_path: Path
) -> None:
    config = {"max_position_embeddings": positions}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    job = replace(tiny_job(tmp_path, tmp_path), examples=[_example(50), _example(student, teacher)])
    assert unsloth.sequence_length(job) == length
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    assert unsloth.sequence_length(job) == length


def test_a_chat_longer_than_the_model_reads_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    job = replace(tiny_job(tiny_llama, tmp_path), examples=[_example(200, 257)])
    with pytest.raises(GattError, match=r"A chat has 257 tokens, and the model reads 256 at most"):
        unsloth.sequence_length(job)


def test_an_interrupted_run_resumes_to_the_same_result(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    class InterruptedTestError(Exception):
        pass

    def interrupt(step: Step) -> None:
        if step.number == 3:
            raise InterruptedTestError

    job = tiny_job(tiny_llama, tmp_path)
    with pytest.raises(InterruptedTestError):
        train_tiny(replace(job, on_step=interrupt))
    assert last_checkpoint(job.checkpoint_dir) == 2
    _assert_same(train_tiny(job), uninterrupted, tolerance=1e-6)


def test_unfinished_checkpoints_of_later_steps_give_way(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    job = tiny_job(tiny_llama, tmp_path)
    for step in (7, 8):
        (job.checkpoint_dir / f"checkpoint-{step}").mkdir(parents=True)
    _assert_same(train_tiny(job), uninterrupted, tolerance=1e-6)
    left = sorted(path.name for path in job.checkpoint_dir.iterdir())
    assert left == ["checkpoint-2", "checkpoint-3"]


def test_a_signal_stops_after_the_next_step_and_saves_it(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    def send_signal(step: Step) -> None:
        if step.number == 1:
            signal.raise_signal(signal.SIGTERM)

    job = tiny_job(tiny_llama, tmp_path, SETTINGS.model_copy(update={"save_steps": 100}))
    with pytest.raises(GattError, match=r"Stopped after step 2, which is saved\."):
        train_tiny(replace(job, on_step=send_signal))
    assert last_checkpoint(job.checkpoint_dir) == 2
    _assert_same(train_tiny(job), uninterrupted, tolerance=1e-6)


def test_a_signal_while_a_checkpoint_is_written_is_shared_at_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that have not got it would wait for ever for the one that has."""
    flags: list[bool] = []

    def any_rank(*, flag: bool, device: torch.device) -> bool:
        flags.append(flag)
        return flag

    def mark(checkpoint: Path) -> None:
        mark_complete(checkpoint)
        if checkpoint.name == "checkpoint-1":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "any_rank", any_rank)
    monkeypatch.setattr(trainer, "mark_complete", mark)
    with pytest.raises(GattError, match=r"Stopped after step 2, which is saved\."):
        train_tiny(tiny_job(tiny_llama, tmp_path))
    assert flags == [False, True, True, True]  # after each of two steps, and at its checkpoint


def test_it_stops_early_when_the_job_says_so(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    validated: list[int] = []

    def should_stop(step: int, checkpoint: Path) -> bool:
        validated.append(step)
        return (checkpoint / "adapter_model.safetensors").exists() and step == 2

    job = replace(tiny_job(tiny_llama, tmp_path), should_stop=should_stop)
    assert train_tiny(job).losses == pytest.approx(uninterrupted.losses[:2])
    assert validated == [1, 2]


def test_a_training_without_steps_left_has_the_adapter_of_its_last_checkpoint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """So ends one that was interrupted while it was found that it may end early."""
    job = replace(tiny_job(tiny_llama, tmp_path), should_stop=lambda step, checkpoint: step == 2)
    stopped = train_tiny(job)
    settings = job.settings.model_copy(update={"max_steps": 2})
    _assert_same(train_tiny(replace(job, settings=settings)), stopped, tolerance=0)


def test_tokens_time_and_memory_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    settings = MICRO_BATCH_SETTINGS.model_copy(update={"max_steps": 2})
    train_tiny(replace(tiny_job(tiny_llama, tmp_path, settings), on_step=steps.append))
    lengths = [len(e.input_ids) for e in tiny_examples()]  # two steps of four are all of them
    tokens = steps[-1].tokens
    assert tokens.learned == sum(n - n // 2 for n in lengths)
    # The teacher reads no further than what it is compared in: index n - 6.
    assert tokens.computed - tokens.padding == sum(n + n - 5 for n in lengths)
    assert 0 < tokens.padding < 20
    assert [step.number for step in steps] == [1, 2]
    assert 0 < steps[0].seconds < steps[1].seconds
    assert steps[-1].peak_memory_bytes > 1e8 and steps[-1].learning_rate > 0


def test_two_processes_share_a_step(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    training = f"""
from support.training import tiny_job, train_tiny
trained = train_tiny(tiny_job(Path({str(tiny_llama)!r}), Path({str(tmp_path / "out")!r})))
"""
    _assert_same(train_in_two_processes(training, tmp_path), uninterrupted)


def test_processes_that_do_not_know_of_each_other_are_refused(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torchrun` starts them without a GPU: each would train on the same dialogues."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GattError, match=r"WORLD_SIZE is 2, but transformers counts 1\."):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_processes_wait_long_for_the_one_that_validates(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's own limit is ten minutes, and the first state of accelerate sets it."""
    import accelerate

    waits: list[timedelta] = []

    class State:
        def __init__(self, *, cpu: bool, timeout: timedelta) -> None:
            waits.append(timeout)

        def main_process_first(self) -> AbstractContextManager[None]:
            return nullcontext()

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with main_process_first():
        pass
    arguments = trainer._training_arguments(tiny_job(tiny_llama, tmp_path))
    assert waits == [timedelta(hours=24)] and arguments.ddp_timeout == 24 * 3600


def test_processes_that_cannot_share_a_batch_are_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(GattError, match=r"3 processes cannot share train.batch_size = 4 dialogues"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_training_starts_from_an_adapter(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    import peft

    model = tiny_peft_model(tiny_llama)
    unsloth.load_init_adapter(model, tiny_adapter)
    expected = peft.load_peft_weights(str(tiny_adapter), device="cpu")
    actual = peft.get_peft_model_state_dict(model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    wider = peft.get_peft_model(model.unload(), peft.LoraConfig(r=8, target_modules="all-linear"))
    assert isinstance(wider, peft.PeftModel)
    with pytest.raises(
        GattError, match=r"of another rank, other targets or another base .* Set train\.rank"
    ):
        unsloth.load_init_adapter(wider, tiny_adapter)
    with pytest.raises(GattError, match=r"no adapter_model\.safetensors in"):
        unsloth.load_init_adapter(model, tmp_path)


def test_the_first_signal_requests_a_stop_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def _example(tokens: int, teacher_tokens: int = 0) -> TrainingExample:
    return TrainingExample(
        input_ids=[1] * tokens,
        labels=[1] * tokens,
        weights=[1.0] * tokens,
        teacher_ids=[1] * teacher_tokens,
    )


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [
        (0, [[100, 90, 300, 500]]),
        (400, [[100, 90], [300], [500]]),  # a dialogue that is too long is on its own
        (2000, [[100, 90, 300, 500]]),
    ],
)
def test_micro_batches_fit_with_their_padding(max_tokens: int, lengths: list[list[int]]) -> None:
    examples = [_example(300), _example(100), _example(90, teacher_tokens=110), _example(500)]
    batches = micro_batches(examples, max_tokens)
    assert [[len(e.input_ids) for e in batch] for batch in batches] == lengths


def test_padding_is_counted_in_both_chats() -> None:
    """The teacher's chat counts up to its last token that is distilled."""
    batch = [
        replace(_example(4, 9), alignment=[(3, 5)]),
        replace(_example(7, 2), alignment=[(6, 1)]),
        _example(5, 5),
    ]
    counts = TokenCounts(learned=1, computed=2, padding=3).plus([batch])
    assert counts == TokenCounts(learned=17, computed=2 + 21 + 12, padding=3 + 5 + 4)


def test_batches_have_similar_lengths_and_every_epoch_all_dialogues(tmp_path: Path) -> None:
    lengths = [10 * n for n in range(1, 33)]
    settings = Train(max_steps=12, batch_size=4)
    job = replace(tiny_job(tmp_path, tmp_path, settings), examples=list(map(_example, lengths)))
    ordered = [len(e.input_ids) for e in length_grouped_batches(job)]
    assert len(ordered) == 48 and sorted(ordered[:32]) == lengths
    batches = [ordered[n : n + 4] for n in range(0, 48, 4)]
    assert all(max(batch) - min(batch) == 30 for batch in batches)
    assert batches[:8] != sorted(batches[:8])
    assert ordered == [len(e.input_ids) for e in length_grouped_batches(job)]
    other_seed = length_grouped_batches(replace(job, seed=2))
    assert ordered != [len(e.input_ids) for e in other_seed]


@pytest.mark.parametrize("count", [1, 3, 33, 35])
def test_batches_stay_full_where_dialogues_do_not_divide_by_their_size(
    tmp_path: Path, count: int
) -> None:
    lengths = [10 * n for n in range(1, count + 1)]
    settings = Train(max_steps=20, batch_size=4)
    job = replace(tiny_job(tmp_path, tmp_path, settings), examples=list(map(_example, lengths)))
    ordered = [len(e.input_ids) for e in length_grouped_batches(job)]
    uses = [ordered.count(length) for length in lengths]
    assert len(ordered) == 80 and max(uses) - min(uses) <= (1 if count < 4 else 2)
    if count > 30:
        # A batch of each epoch may mix what was left of the one before; the others are grouped.
        spread = [max(ordered[n : n + 4]) - min(ordered[n : n + 4]) for n in range(0, 80, 4)]
        assert sum(spread) / len(spread) < 60


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) == 0
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        mark_complete(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path) == 10


def test_mlx_is_chosen_on_apple_silicon_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend() is unsloth
    monkeypatch.setattr(mlx, "available", lambda: True)
    assert choose_backend() is mlx


class _FakeValidation:
    """Three replies at each checkpoint, of which as many are adherent as the step's number."""

    def __init__(self, *_: object) -> None:
        """Accept anything."""

    def measure(self, checkpoint: Path) -> list[Reply]:
        adherent = int(checkpoint.name.split("-")[1])
        return [_reply(obeys=n < adherent) for n in range(3)]


def _reply(*, obeys: bool) -> Reply:
    return Reply(
        arm="",
        dialogue="",
        turn=1,
        text="",
        prompt_tokens=0,
        tokens=0,
        finish="stop",
        obeys=obeys,
        defect="",
    )


def test_validation_is_logged_and_stops_when_enough_answers_are_adherent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "Validation", _FakeValidation)
    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"])
    recipe, run_dir = Recipe(train=Train(early_stop_adherence=0.6)), RunDir(tmp_path)
    base = AdaptableBase(lambda: tmp_path, dora=True)
    with closing(train_stage.ValidationHook(recipe, run_dir, base)) as hook:
        assert hook.last_note == ""
        stops = [hook.should_stop(step, Path(f"checkpoint-{step}")) for step in (1, 2)]
    assert stops == [False, True]
    assert hook.last_note == ", 2 of 3 validation answers adherent at step 2"
    rows = [row for _, row in read_jsonl(run_dir.validation)]
    assert rows == [{"step": step, "adherent": step, "answers": 3} for step in (1, 2)]
    with closing(train_stage.ValidationHook(recipe, run_dir, base)) as hook:
        assert not hook.has_reached(1, Path("checkpoint-1"))
        assert hook.has_reached(2, Path("checkpoint-2"))  # both are in the log
        assert len(run_dir.validation.read_text().splitlines()) == 2
        assert hook.has_reached(3, Path("checkpoint-3"))  # interrupted before it was measured
    assert len(run_dir.validation.read_text().splitlines()) == 3


def test_without_early_stopping_a_resumed_training_goes_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "Validation", _FakeValidation)
    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"])
    weights, run_dir = AdaptableBase(lambda: base), RunDir(tmp_path)
    with closing(train_stage.ValidationHook(Recipe(), run_dir, weights)) as hook:
        assert not hook.has_reached(3, Path("checkpoint-3"))
    assert not run_dir.validation.read_text()


def test_early_stopping_needs_validation_dialogues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "read_split", lambda *_: [])
    base = AdaptableBase(lambda: tmp_path)
    hook = train_stage.ValidationHook(Recipe(), RunDir(tmp_path), base)
    assert not hook.should_stop(1, tmp_path)
    recipe = Recipe(train=Train(early_stop_adherence=0.6))
    with pytest.raises(GattError, match="Give the instructions checks"):
        train_stage.ValidationHook(recipe, RunDir(tmp_path), base)


def test_the_progress_line_of_a_step() -> None:
    step = Step(
        number=3,
        loss=0.25,
        learning_rate=8e-4,
        tokens=TokenCounts(learned=500, computed=2000, padding=10),
        seconds=2.0,
        peak_memory_bytes=1_500_000_000,
    )
    assert train_stage.format_step(step) == (
        "loss 0.250, rate 8.0e-04, 250 learned tokens/s, 1.5 GB"
    )


def test_own_chats_are_mixed_in_by_their_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    file.write_text((json.dumps({"messages": chat}) + "\n") * 30, encoding="utf-8")
    recipe = Recipe(train=Train(replay_data=str(file), replay_ratio=0.2))
    assert len(replay_chats(recipe, 80)) == 20  # 20 of 100
    assert len(replay_chats(recipe, 800)) == 30  # all there are
    assert "has 30 chats, fewer than the 200" in capsys.readouterr().err
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    with pytest.raises(GattError, match=r"1 without an answer .*line 1"):
        replay_chats(recipe, 80)


@pytest.mark.slow
def test_a_base_in_16_bits_is_trained_as_it_is_exported(tiny_llama: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"load_in_4bit": False})
    job = tiny_job(tiny_llama, tmp_path, settings)
    trained = choose_backend().train(job).logits
    distances = []
    for round_trip in (None, unsloth.nf4_round_trip):
        merged = plan_merge(tiny_llama, job.adapter_dir, nf4_round_trip=round_trip)
        write(merged, {tmp_path / "tuned.gguf": uniform_format(merged.tensors, "F32")})
        exported = verify.load_and_predict(tmp_path / "tuned.gguf", (), trained.sequences)
        distances.append(mean_kl(trained.values, exported.logits.values))
    assert distances[0] < 1e-3 < 10 * distances[0] < distances[1]


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_is_what_the_recipe_asks_for(dora: bool, tmp_path: Path) -> None:
    settings = Train(
        rank=8,
        alpha=16,
        rslora=True,
        dora=dora,
        target_modules=("q_proj", "down_proj"),
        max_steps=2,
        lr_scheduler_type="linear",
        loss="distill",
        load_in_4bit=True,
    )
    model_dir = cached_checkpoint(find_model("smollm2-135m"))
    teacher_chat: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Light is scattered."},
        {"role": "user", "content": "And red?"},
        {"role": "assistant", "content": "It is late."},
    ]
    chat: list[Message] = [
        {"role": m["role"], "content": f"Ahoy! {m['content']} Over and out."}
        if m["role"] == "assistant"
        else m
        for m in teacher_chat
    ]
    example = build_example(unsloth.load_tokenizer(model_dir), chat, settings, teacher_chat)
    job = TrainingJob(
        model_dir=model_dir,
        examples=[example] * 4,
        settings=settings,
        seed=1,
        checkpoint_dir=tmp_path / "checkpoints",
        adapter_dir=tmp_path / "adapter",
    )
    trained = choose_backend().train(job).logits
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, True)
    assert config["use_dora"] == dora
    assert set(config["target_modules"]) == {"q_proj", "down_proj"}
    base = find_model("smollm2-135m").path
    merged = plan_merge(base, tmp_path / "adapter", nf4_round_trip=unsloth.nf4_round_trip)
    write(merged, {tmp_path / "tuned.gguf": uniform_format(merged.tensors, "F16")})
    exported = verify.load_and_predict(tmp_path / "tuned.gguf", (), trained.sequences)
    # bfloat16 rounds; merged onto the 16-bit weights it would be 0.3.
    assert mean_kl(trained.values, exported.logits.values) < 0.005


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 6), torch.bfloat16)]
)
def test_4_bits_are_rounded_from_the_format_of_the_card(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsloth, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert unsloth.training_dtype() is dtype
