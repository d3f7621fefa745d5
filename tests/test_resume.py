"""Runs that are interrupted: each continues where it was and ends as if it had not been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.cli import TINY_RECIPE, Gatt, override_flags

from pipeline.files import read_jsonl, write_jsonl
from pipeline.run import open_run, run_stage
from pipeline.run_dir import RunDir

_WEIGHTS = "adapter_model.safetensors"
_REPLY_KEY = ("arm", "dialogue", "turn", "recall_attribute")


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "pipeline", *map(str, words)]


def _copy(run_dir: RunDir, folder: Path) -> RunDir:
    """Return a copy that has to train."""
    ignored = shutil.ignore_patterns("train", "export", "evaluate", "report")
    shutil.copytree(run_dir.path, folder, dirs_exist_ok=True, ignore=ignored)
    return RunDir(folder)


def test_interrupted_synthesis_resumes_and_gives_the_same_data(
    finished: RunDir, tmp_path: Path
) -> None:
    recipe, run_dir = open_run(None, tmp_path, TINY_RECIPE)
    run_stage("instructions", recipe, run_dir)
    log = finished.answers.read_bytes()
    run_dir.answers.parent.mkdir()
    run_dir.answers.write_bytes(log[: len(log) // 2])  # as a killed process leaves it
    run_stage("synthesize", recipe, run_dir)
    assert run_dir.examples.read_bytes() == finished.examples.read_bytes()
    keys = [(r["dialogue"], r["turn"], r["candidate"]) for _, r in read_jsonl(run_dir.answers)]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_interrupted_training_resumes_and_gives_the_same_adapter(
    finished: RunDir, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    run_dir = _copy(finished, tmp_path)
    shutil.copytree(
        finished.checkpoints.parent,
        run_dir.checkpoints.parent,
        ignore=shutil.ignore_patterns("manifest.json", "adapter"),
    )
    first = run_dir.checkpoints / "checkpoint-1" / _WEIGHTS
    mtime = first.stat().st_mtime_ns
    # As if interrupted while it was written.
    (run_dir.checkpoints / "checkpoint-2" / "complete").unlink()
    assert gatt("train", "--run", tmp_path, *tiny).returncode == 0
    assert first.stat().st_mtime_ns == mtime  # step 1 was not repeated
    assert (run_dir.adapter / _WEIGHTS).read_bytes() == (finished.adapter / _WEIGHTS).read_bytes()


@pytest.mark.slow
def test_interrupted_evaluation_resumes_and_gives_the_same_numbers(
    finished: RunDir, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("checkpoints", "manifest.json", "scores.json", "report")
    shutil.copytree(finished.path, tmp_path, dirs_exist_ok=True, ignore=ignored)
    run_dir = RunDir(tmp_path)
    # Half of the replies of every arm, and an incomplete line as a killed process leaves it.
    lines = run_dir.replies.read_bytes().splitlines(keepends=True)
    run_dir.replies.write_bytes(b"".join(lines[::2]) + lines[1][:40])
    run_stage("evaluate", *open_run(None, tmp_path, TINY_RECIPE))
    _assert_same_records(run_dir.replies, finished.replies, _REPLY_KEY)
    assert run_dir.scores.read_bytes() == finished.scores.read_bytes()


def test_another_tuned_model_is_measured_against_the_replies_of_the_base_that_there_are(
    finished: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only requests that no earlier evaluation has made of the same model are generated."""
    shutil.copytree(
        finished.path, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report")
    )
    run_dir = RunDir(tmp_path)
    rows = [row for _, row in read_jsonl(run_dir.replies)]
    last = max(row["turn"] for row in rows)
    for row in rows:
        row["text"] = "As before." if row["turn"] == last else row["text"]
    write_jsonl(run_dir.replies, rows)
    adapter = run_dir.path / "export" / "adapter.gguf"
    overrides = (*TINY_RECIPE, f"evaluate.adapter='{adapter}'", "evaluate.adapter_scale=0.5")
    run_stage("evaluate", *open_run(None, tmp_path, overrides))
    texts = {
        arm: {
            row["text"]
            for _, row in read_jsonl(run_dir.replies)
            if (row["arm"], row["turn"]) == (arm, last)
        }
        for arm in ("base", "ceiling", "tuned")
    }
    assert texts["base"] == texts["ceiling"] == {"As before."}
    assert "As before." not in texts["tuned"]
    reused = sum(row["arm"] != "tuned" for row in rows)
    assert f"evaluate: {reused} replies are those of earlier" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_that_is_asked_to_stop_saves_and_resumes(
    number: signal.Signals, finished: RunDir, tmp_path: Path, gatt: Gatt
) -> None:
    flags = override_flags((*TINY_RECIPE, "train.max_steps=30", "train.save_steps=50"))
    adapters = []
    for is_stopped in (False, True):
        run_dir = _copy(finished, tmp_path / str(is_stopped))
        words = ("train", "--run", run_dir.path, *flags)
        if is_stopped:
            _stop_in_training(_command(*words), number)
        done = gatt(*words)
        assert done.returncode == 0, done.stderr
        adapters.append((run_dir.adapter / _WEIGHTS).read_bytes())
    assert adapters[0] == adapters[1]


def _stop_in_training(command: list[str], number: signal.Signals) -> None:
    """Send the signal as soon as the command reports a step; it has to say that it stopped."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "train: steps" in line and "Stopped" not in line:
                process.send_signal(number)
                break
        lines += process.stderr
    assert process.returncode == 1
    assert "Stopped after step" in lines[-1], lines


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(
    finished: RunDir, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    """The command under `accelerate launch`: checkpoints, held-out answers, one run folder."""
    run_dir = _copy(finished, tmp_path)
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split()]
    command += ["--main_process_port", "0", *_command("train", "--run", tmp_path, *tiny)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    losses, expected = (
        json.loads(run.losses.read_text(encoding="utf-8")) for run in (run_dir, finished)
    )
    # A hundred tokens in bfloat16; in float32 they are equal (test_trainer.py).
    assert losses == pytest.approx(expected, rel=3e-2)
    assert len(list(read_jsonl(run_dir.validation))) == 2
    weights, expected_weights = (
        np.concatenate([matrix.ravel() for matrix in load_file(run.adapter / _WEIGHTS).values()])
        for run in (run_dir, finished)
    )
    norms = np.linalg.norm(weights) * np.linalg.norm(expected_weights)
    assert weights @ expected_weights > 0.99 * norms
    again = gatt("train", "--run", tmp_path, *tiny)
    assert again.stderr.strip().endswith("train: done already")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX")
def test_ten_kills_lose_nothing(
    finished: RunDir, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    words = ("run", "--run", tmp_path, *tiny)
    seconds = random.Random(1)
    manifests: dict[Path, int] = {}
    for _ in range(10):
        _kill_after(seconds.uniform(1, 30), _command(*words))
        present = {
            path: path.stat().st_mtime_ns
            for path in tmp_path.glob("*/manifest.json")
            if path.parent.name != "report"  # every run renders it again
        }
        assert manifests.items() <= present.items()  # a finished stage is not repeated
        manifests = present
    done = gatt(*words)
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(tmp_path)
    _assert_same_records(run_dir.answers, finished.answers, ("dialogue", "turn", "candidate"))
    _assert_same_records(run_dir.replies, finished.replies, _REPLY_KEY)


def _kill_after(seconds: float, command: list[str]) -> None:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    with contextlib.suppress(ProcessLookupError):  # it had finished
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _assert_same_records(log: Path, expected_log: Path, key: tuple[str, ...]) -> None:
    """Check that nothing was generated twice, and nothing lost or different."""
    records, expected = ([row for _, row in read_jsonl(path)] for path in (log, expected_log))
    keys = [tuple(record[name] for name in key) for record in records]
    assert len(keys) == len(set(keys))
    assert sorted(map(str, records)) == sorted(map(str, expected))
