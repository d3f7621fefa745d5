"""The arm `steer`: control vectors change what a model says, and an exam with them goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cores import pretend_cores
from support.exam import OPTIONS
from support.models import save_tiny_llama
from support.scripted_model import write_scripted_gguf
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.exam.arms import DEFAULT_ARMS, find_arms, holding
from pipeline.exam.dialogue_run import SharedTime
from pipeline.exam.inspect_eval.options import arms_of
from pipeline.exam.models import ExamModel
from pipeline.exam.result import ExamResult, read_result
from pipeline.exam.steering import USER_MESSAGES, Steering, require_steering, steered_passes
from pipeline.exam.tasks import exam_tasks
from pipeline.gatt.ghost import with_instruction
from pipeline.gguf.base import Array
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import engines_opened_by
from pipeline.inference.logits import log_softmax
from pipeline.records import Message
from pipeline.stages.compare import compare
from pipeline.stages.exam import run

_OPTIONS = replace(OPTIONS, turns="8", arms=("once", "steer"), regimes=("replaced",), max_tokens=8)


def _write_tiny_gguf(folder: Path) -> None:
    """Write a random model with room for a whole dialogue in bytes.

    It has three layers: a vector is not added to the first, and the cache has nothing of what is
    added to the last.
    """
    save_tiny_llama(folder, layers=3, context=4096)
    write_formats(Model("tiny", folder), None, {"F32": folder / "tiny.gguf"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF of a random model with a context of 4,096 tokens."""
    return make_once(tmp_path_factory, "steered-model", _write_tiny_gguf) / "tiny.gguf"


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread: several would wait for each other while another program holds a core."""
    pretend_cores(monkeypatch, 1)


def _chat(user: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": user},)


def _logits(engine: BatchEngine, user: str, answer: str) -> Array:
    """Return the logits (tokens, vocab_size) along an answer."""
    prompt = engine.tokenize(engine.template.render(_chat(user)))
    return np.stack(list(engine.logits(prompt + engine.tokenize(answer), len(prompt) - 1)))


def _divergence(target: Array, logits: Array) -> float:
    """Return the mean KL divergence from `target` in nats for each token."""
    rows = [(log_softmax(t), log_softmax(row)) for t, row in zip(target, logits, strict=True)]
    return float(np.mean([(np.exp(t) * (t - row)).sum() for t, row in rows]))


@pytest.mark.usefixtures("one_core")
def test_the_embedded_model_moves_towards_the_instruction(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.exam.steering.USER_MESSAGES", USER_MESSAGES[:2])
    instruction, user = "Write every answer in French.", "What do penguins eat?"
    answer = "Les pingouins mangent des poissons."
    with BatchEngine(base, 1, 512) as engine:
        target = _logits(engine, with_instruction(instruction, user), answer)
        plain = _logits(engine, user, answer)
        with Steering(engine, find_arms(["steer"])[0].strength) as steering:
            vector = steering.vector(instruction)
            engine.steer(vector)
            steered = _logits(engine, user, answer)
        restored = _logits(engine, user, answer)
    assert vector.shape == (30, 576)
    assert np.linalg.norm(vector) > 1
    assert np.array_equal(restored, plain)  # bit for bit
    assert _divergence(target, steered) < 0.8 * _divergence(target, plain)


@pytest.mark.usefixtures("one_core")
def test_a_vector_is_added_to_the_layer_of_its_row(tiny: Path) -> None:
    with BatchEngine(tiny, 1, 256) as engine, engine.layer_reader() as reader:
        plain = reader.read(_chat("Hello"))
        assert plain.shape == (3, 64)
        assert np.array_equal(reader.read(_chat("Hello")), plain)
        assert not np.allclose(reader.read(_chat("Help!")), plain)
        row = np.zeros_like(plain)
        row[1] = 3
        before = _logits(engine, "Hello", "x")
        engine.steer(np.zeros_like(plain))
        assert np.array_equal(_logits(engine, "Hello", "x"), before)
        row[0], row[1] = 3, 0
        engine.steer(row)  # llama.cpp has no vector for the first layer
        assert np.array_equal(_logits(engine, "Hello", "x"), before)
        row[0], row[1] = 0, 3
        engine.steer(row)
        assert not np.allclose(_logits(engine, "Hello", "x"), before, atol=0.1)
        with pytest.raises(GattError, match="expected at most 1024"):
            reader.read(_chat("x y z " * 400))


@pytest.mark.usefixtures("one_core")
def test_no_cell_of_another_vector_is_used_again(tiny: Path) -> None:
    user, answer = "What do penguins eat?", "Fish"
    vector = np.zeros((3, 64), np.float32)
    vector[1, ::3] = 1
    with BatchEngine(tiny, 1, 256) as engine:
        engine.steer(vector)
        steered = _logits(engine, user, answer)
    with BatchEngine(tiny, 1, 256) as engine:
        plain = _logits(engine, user, answer)
        assert not np.allclose(plain, steered, atol=0.1)
        engine.steer(vector)
        assert np.array_equal(_logits(engine, user, answer), steered)
        engine.steer(None)
        assert np.array_equal(_logits(engine, user, answer), plain)


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "tiny.replies.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def _texts(folder: Path) -> dict[tuple[str, str, int], str]:
    replies = [row["reply"] for row in _rows(folder)]
    return {(r["arm"], r["dialogue"], r["turn"]): r["text"] for r in replies}


def _result(folder: Path) -> ExamResult:
    return read_result(folder / "tiny.json")


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the instructions that are steered towards; each takes 0.1 s longer."""
    instructions: list[str] = []
    apply = Steering.apply

    def slow(self: Steering, instruction: str) -> None:
        time.sleep(0.1)
        instructions.append(instruction)
        apply(self, instruction)

    monkeypatch.setattr(Steering, "apply", slow)
    yield instructions


_HELD = [
    'Begin every answer with "Let me think:".',
    "Write every answer in French.",
    'Begin every answer with "My answer is:".',
    "Write every answer in Spanish.",
]


@pytest.mark.usefixtures("one_core")
def test_an_exam_is_steered_towards_what_holds_and_goes_on(
    tiny: Path,
    tmp_path: Path,
    applied: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run([str(tiny)], _OPTIONS, tmp_path / "one")
    assert "tiny with a control vector (steer): 0%." in capsys.readouterr().out
    assert applied == _HELD
    once, steer = _result(tmp_path / "one").arms
    assert (once.name, steer.name) == ("once", "steer")
    assert (steer.answers, steer.reminder_tokens) == (16, 0)
    seconds = {
        (row["reply"]["dialogue"], row["reply"]["turn"]): row["seconds"]
        for row in _rows(tmp_path / "one")
        if row["reply"]["arm"] == "steer"
    }
    for number, turn in ((1, 1), (2, 1), (1, 7), (2, 8)):  # the first ones after a new vector
        assert seconds[f"replaced-0{number}", turn] >= 0.1
    texts = _texts(tmp_path / "one")
    turns = [(d, t) for arm, d, t in texts if arm == "steer"]
    assert len(turns) == 16
    assert sum(texts["steer", d, t] != texts["once", d, t] for d, t in turns) > 8
    # An interrupted exam gives the same replies, and makes only the vectors that it needs.
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    log = tmp_path / "two" / "tiny.replies.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    first = [line for line in lines[1:] if '"steer"' in line][:7]
    log.write_text("".join([lines[0], *first]), encoding="utf-8")
    applied.clear()
    run([str(tiny)], replace(_OPTIONS, arms=("steer",)), tmp_path / "two")
    assert applied == _HELD[1:]
    steered = {key: text for key, text in texts.items() if key[0] == "steer"}
    assert _texts(tmp_path / "two") == steered
    # What is done makes no vector and loads no model.
    applied.clear()
    monkeypatch.setattr(ExamModel, "open", None)
    run([str(tiny)], _OPTIONS, tmp_path / "one")
    assert not applied
    files = [tmp_path / name / "tiny.json" for name in ("one", "two")]
    compare(files, tmp_path / "compared")
    assert "steer" in (tmp_path / "compared" / "compare.html").read_text(encoding="utf-8")


def test_each_turn_is_in_the_pass_of_what_holds_then() -> None:
    tasks, turns = exam_tasks((), 0, 20), range(1, 21)
    covered = [
        (part.task.id, turn, steered.instruction)
        for steered in steered_passes(tasks)
        for part in steered.parts
        for turn in turns
        if not part.last_turn or turn <= part.last_turn
    ]
    # A later pass goes on where the first one ended, so the last entry of a turn is none of its.
    first: dict[tuple[str, int], str] = {}
    for dialogue, turn, instruction in covered:
        first.setdefault((dialogue, turn), instruction)
    assert first == {(t.id, n): holding(t.assigned, n - 1) for t in tasks for n in turns}
    assert sum(not steered.instruction for steered in steered_passes(tasks)) == 1  # "stopped"
    assert len(steered_passes(tasks)) < len(tasks)


def test_user_messages_of_vectors_are_not_those_of_the_exam() -> None:
    turns = {turn for task in exam_tasks((), 0, 50) for turn in task.assigned.dialogue.turns}
    assert not turns & set(USER_MESSAGES)


def test_the_time_before_an_answer_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    shared = SharedTime()
    with shared.preparing():
        now[0] = 5
    first, second = shared.start(), shared.start()
    now[0] = 7
    assert shared.end(first) == 5 + 1
    assert shared.end(second) == 1


@pytest.mark.parametrize(
    ("name", "strength"), [("steer-2", 2), ("steer-0.5", 0.5), ("steer-10", 10)]
)
def test_an_arm_has_a_strength(name: str, strength: float) -> None:
    (arm,) = find_arms([name])
    assert (arm.kind, arm.strength) == ("steer", strength)
    assert "steer" not in DEFAULT_ARMS


@pytest.mark.parametrize("name", ["steer-0", "steer-0.0", "steer-", "steer--1", "steer-100"])
def test_a_wrong_strength_is_refused(name: str) -> None:
    with pytest.raises(GattError, match=r"No arm 'steer-.*steer or steer-S"):
        find_arms([name])


def test_only_a_model_on_this_machine_is_steered(tiny: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(GattError, match=r"--arm steer: http://127.0.0.1:9/v1 is a server"):
        run([str(tiny), url], _OPTIONS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arms = find_arms(["once", "steer-2"])
    with (
        engines_opened_by(lambda *_: BatchEngine(tiny, 1, 256)),
        pytest.raises(GattError, match=r"--arm steer-2: .*without --ray"),
    ):
        require_steering([ExamModel(name="tiny", path=tiny)], arms)
    with pytest.raises(GattError, match=r"-T arms=steer-2: .*gatt exam MODEL.gguf --arm steer-2"):
        arms_of("once,steer-2")


@pytest.mark.usefixtures("one_core")
def test_a_model_that_llama_cpp_cannot_steer_is_refused_at_once(tmp_path: Path) -> None:
    write_scripted_gguf(tmp_path, ("yes",))  # it has one layer, and the first one has no vector
    with pytest.raises(GattError, match=r"no control vectors for scripted.gguf .*llama, 1 layers"):
        run([str(tmp_path / "scripted.gguf")], _OPTIONS, tmp_path / "out")
    log = tmp_path / "out" / "scripted.replies.jsonl"
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1  # not even told once
