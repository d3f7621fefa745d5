"""The training loop on a tiny random model: micro-batches, short memory, processes, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
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
    train_tiny,
)

from pipeline.errors import GattError
from pipeline.export import verify
from pipeline.files import read_jsonl
from pipeline.gguf.formats import uniform_format
from pipeline.gguf.merge import plan_merge, write
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
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
    mark_complete,
    micro_batches,
)
from pipeline.training.loss import Batch, gatt_loss

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

    def recorded(
        model: PeftModel, batch: Batch, settings: Train, weight: torch.Tensor
    ) -> torch.Tensor:
        shapes.append(tuple(batch["input_ids"].shape))
        return gatt_loss(model, batch, settings, weight)

    monkeypatch.setattr(trainer, "gatt_loss", recorded)
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

    def short_of_memory(
        model: PeftModel, batch: Batch, settings: Train, weight: torch.Tensor
    ) -> torch.Tensor:
        rows.append(len(batch["input_ids"]))
        loss = gatt_loss(model, batch, settings, weight)
        if batch["input_ids"].numel() > 60:
            loss.backward()  # the gradients of an interrupted step must not count
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
            )
        return loss

    monkeypatch.setattr(trainer, "gatt_loss", short_of_memory)
    _assert_same(train_tiny(tiny_job(tiny_llama, tmp_path)), uninterrupted)
    assert rows[0] == 4 and rows[-1] < 4
    assert "out of memory; continuing with at most" in capsys.readouterr().err


def test_one_dialogue_that_does_not_fit_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(trainer, "gatt_loss", out_of_memory)
    with pytest.raises(GattError, match=r"Too little memory to train on a dialogue of \d+ tokens"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_other_errors_are_raised(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> NoReturn:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer, "gatt_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


def test_a_loss_that_is_not_finite_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(
        model: PeftModel, batch: Batch, settings: Train, weight: torch.Tensor
    ) -> torch.Tensor:
        return gatt_loss(model, batch, settings, weight) * torch.inf

    monkeypatch.setattr(trainer, "gatt_loss", infinite)
    with pytest.raises(GattError, match=r"The loss of step 1 is (inf|nan)\. Lower train\.learn"):
        train_tiny(tiny_job(tiny_llama, tmp_path))


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


def test_tokens_time_and_memory_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    settings = MICRO_BATCH_SETTINGS.model_copy(update={"max_steps": 2})
    train_tiny(replace(tiny_job(tiny_llama, tmp_path, settings), on_step=steps.append))
    lengths = [len(e.input_ids) for e in tiny_examples()]  # two steps of four are all of them
    tokens = steps[-1].tokens
    assert tokens.learned == sum(n - n // 2 for n in lengths)
    assert tokens.computed - tokens.padding == sum(n + n - 2 for n in lengths)
    assert 0 < tokens.padding < 20
    assert [step.number for step in steps] == [1, 2]
    assert 0 < steps[0].seconds < steps[1].seconds
    assert steps[-1].peak_memory_bytes > 1e8 and steps[-1].learning_rate > 0


_ONE_OF_TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from support.training import tiny_job, train_tiny
trained = train_tiny(tiny_job(Path({model_dir!r}), Path({out!r})))
torch.save(tuple(trained), {result!r})
"""


def test_two_processes_share_a_step(
    tiny_llama: Path, tmp_path: Path, uninterrupted: Trained
) -> None:
    script, result = tmp_path / "train.py", tmp_path / "result"
    script.write_text(
        _ONE_OF_TWO_PROCESSES.format(
            tests=str(Path(__file__).parent),
            model_dir=str(tiny_llama),
            out=str(tmp_path / "out"),
            result=str(result),
        ),
        encoding="utf-8",
    )
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", str(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _assert_same(Trained(*torch.load(result, weights_only=False)), uninterrupted)


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
    counts = TokenCounts(learned=1, computed=2, padding=3).plus([[_example(4, 6), _example(7, 2)]])
    assert counts == TokenCounts(learned=12, computed=28, padding=3 + 3 + 4)


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
        self.closed = False

    def measure(self, checkpoint: Path) -> list[Reply]:
        adherent = int(checkpoint.name.split("-")[1])
        return [_reply(obeys=n < adherent) for n in range(3)]

    def close(self) -> None:
        self.closed = True


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
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "Validation", _FakeValidation)
    monkeypatch.setattr(train_stage, "cached_gguf", lambda *_: base)
    monkeypatch.setattr(train_stage, "read_split", lambda *_: ["a dialogue"])
    recipe, run_dir = Recipe(train=Train(early_stop_adherence=0.6)), RunDir(tmp_path)
    with closing(train_stage.ValidationHook(recipe, run_dir)) as hook:
        assert hook.last_note == ""
        stops = [hook.should_stop(step, Path(f"checkpoint-{step}")) for step in (1, 2)]
    assert stops == [False, True]
    assert hook.last_note == ", 2 of 3 validation answers adherent at step 2"
    rows = [row for _, row in read_jsonl(run_dir.validation)]
    assert rows == [{"step": step, "adherent": step, "answers": 3} for step in (1, 2)]


def test_early_stopping_needs_validation_dialogues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "read_split", lambda *_: [])
    hook = train_stage.ValidationHook(Recipe(), RunDir(tmp_path))
    assert not hook.should_stop(1, tmp_path)
    recipe = Recipe(train=Train(early_stop_adherence=0.6))
    with pytest.raises(GattError, match=r"Raise dialogues\.validation"):
        train_stage.ValidationHook(recipe, RunDir(tmp_path))


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
    with pytest.raises(GattError, match="line 1: expected at least one answer"):
        replay_chats(recipe, 80)


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
