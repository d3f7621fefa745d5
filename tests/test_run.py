"""The whole job through the real command line: real model, real training, real GGUF."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Gatt

from pipeline.files import read_jsonl
from pipeline.gguf.reader import open_gguf


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, gatt: Gatt, tiny: list[str]) -> Path:
    """A run of a minute."""
    folder = tmp_path_factory.mktemp("run")
    done = gatt("run", "--run", folder, *tiny)
    assert done.returncode == 0, done.stderr
    return folder


def test_everything_is_there(finished: Path) -> None:
    report = json.loads((finished / "report" / "report.json").read_text())
    assert {row["arm"] for row in report["scores"]["by_turn"]} == {"base", "tuned", "ceiling"}
    assert [n["all"] for n in report["scores"]["replies"].values()] == [9, 9, 9]
    page = (finished / "report" / "report.html").read_text()
    assert "<svg" in page and "A shortened run" in page
    assert not re.search(r"(src|href)=.http|url\(.?http|@import", page)  # asks nobody for anything


def test_the_export_is_the_model_that_was_trained(finished: Path) -> None:
    """Merged onto the weights that training had, rounded to 4 bits, the file predicts what the trained model did; and merged
    onto those without the errors of the rounding, it finds the dialogues likelier."""
    table = json.loads((finished / "export" / "export.json").read_text())
    assert table["merges"]["nf4"] < 0.005 < 0.05 < table["merges"]["fp16"]
    assert table["nll"]["fp16"] < table["nll"]["nf4"]
    assert table["merge_base"] == "fp16"
    assert table["formats"]["Q8_0"]["kl_trained"] == pytest.approx(
        table["merges"]["fp16"], abs=0.05
    )
    assert table["formats"]["Q8_0"]["kl_f16"] < 0.02
    assert min(table["formats"]["Q8_0"]["retained"].values()) > 0.5
    made = {p.name for p in (finished / "export").iterdir()} - {"manifest.json", "started.json"}
    assert made == {"Modelfile", "adapter.gguf", "export.json", "lmstudio", "tuned-Q8_0.gguf"}
    layout = finished / "export" / "lmstudio" / "gatt" / "tuned-Q8_0" / "tuned-Q8_0.gguf"
    assert layout.samefile(finished / "export" / "tuned-Q8_0.gguf")


def test_held_out_answers_are_watched_at_each_checkpoint(finished: Path) -> None:
    rows = [row for _, row in read_jsonl(finished / "train" / "validation.jsonl")]
    assert [(row["step"], row["answers"]) for row in rows] == [(1, 8), (2, 8)]
    pairs = json.loads((finished / "instructions" / "pairs.json").read_text())
    watched = {row["dialogue"]["id"] for row in pairs["validate"]}
    assert len(watched) == 1
    assert not watched & {
        row["dialogue"]["id"].split("@")[0] for side in ("train", "evaluate") for row in pairs[side]
    }


def test_the_file_says_what_it_is(finished: Path, base: Path) -> None:
    tuned, before = open_gguf(finished / "export" / "tuned-Q8_0.gguf"), open_gguf(base)
    assert tuned.field("general.license") == before.field("general.license") == "apache-2.0"
    assert tuned.field("general.name") == before.field("general.name")
    assert tuned.field("general.finetune") == "GAtt"
    assert (
        tuned.field("general.base_model.0.repo_url")
        == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert tuned.field("general.dataset.0.description") == "user turns: seed"
    assert tuned.chat_template == before.chat_template


@pytest.mark.slow
def test_an_adapter_is_measured_over_the_base(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    adapter = finished / "export" / "adapter.gguf"
    other = shutil.copyfile(adapter, tmp_path / "rival.gguf")
    done = gatt(
        "evaluate",
        "--run",
        tmp_path,
        "--adapter",
        adapter,
        "--adapter-scale",
        "0.5",
        "--other",
        other,
        *tiny,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        {
            (r["arm"], r["dialogue"], r["turn"], r["probe"]): r["text"]
            for _, r in read_jsonl(folder / "evaluate" / "replies.jsonl")
        }
        for folder in (tmp_path, finished)
    )
    assert {key[0] for key in ours} == {"base", "tuned", "rival", "ceiling"}
    assert {key for key in ours if key[0] != "rival"} == theirs.keys()
    differ = {key[0] for key in theirs if ours[key] != theirs[key]}
    assert differ == {"tuned"}  # the base's own contexts know nothing of the adapter
    scores = json.loads((tmp_path / "evaluate" / "scores.json").read_text())
    assert scores["degradation"]["perplexity"].keys() == {"base", "tuned", "rival"}
    assert (
        scores["degradation"]["kl"]["rival"] > scores["degradation"]["kl"]["tuned"] > 0
    )  # at half its strength it moves less
    wrong = gatt(
        "evaluate", "--run", tmp_path, "--adapter", finished / "export" / "tuned-Q8_0.gguf", *tiny
    )
    assert wrong.returncode == 1
    assert "is no adapter" in wrong.stderr
    missing = gatt("evaluate", "--run", tmp_path, "--other", tmp_path / "nothing.gguf", *tiny)
    assert missing.returncode == 1
    assert "no file at" in missing.stderr and "a server's address" in missing.stderr


def test_the_same_evaluation_gives_the_same_numbers(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "evaluate")
    done = gatt("evaluate", "--run", tmp_path, *tiny)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluate" / "scores.json").read_text() == (
        finished / "evaluate" / "scores.json"
    ).read_text()


def test_every_suite_is_measured(finished: Path) -> None:
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    assert {row["at"] for row in scores["recall"]} == {2, 3}
    assert {row["at"] for row in scores["recall_by_attribute"]} == {"name", "hobby"}
    assert {row["arm"] for row in scores["single"]} == {"base", "tuned"}
    assert scores["change"]["base"]["at"] == 2
    assert scores["leakage"][0]["n"] == 3
    assert scores["degradation"]["tokens"] > 20


def test_training_and_evaluation_do_not_share_a_dialogue(finished: Path) -> None:
    pairs = json.loads((finished / "instructions" / "pairs.json").read_text())
    trained = {row["dialogue"]["id"].split("@")[0] for row in pairs["train"]}
    assert not trained & {row["dialogue"]["id"] for row in pairs["evaluate"]}


def test_the_instruction_stands_in_turn_one_only(finished: Path) -> None:
    pairs = {
        row["dialogue"]["id"]: row
        for row in json.loads((finished / "instructions" / "pairs.json").read_text())["train"]
    }
    for _, row in read_jsonl(finished / "synthesize" / "dialogues.jsonl"):
        users = [m["content"] for m in row["messages"] if m["role"] == "user"]
        plain = pairs[row["dialogue"]]["dialogue"]["turns"]
        assert users[1:] == plain[1 : len(users)]
        assert users[0].startswith(plain[0])


def test_a_second_run_repeats_nothing(finished: Path, gatt: Gatt, tiny: list[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.jsonl")}
    done = gatt("run", "--run", finished, *tiny)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done already") == 5
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.jsonl")} == before


def test_synthesis_cut_off_goes_on_and_gives_the_same_data(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    for stage in ("instructions", "synthesize"):
        if stage == "synthesize":  # as a killed process leaves it: some answers, half a line
            whole = (finished / "synthesize" / "answers.jsonl").read_bytes()
            (tmp_path / "synthesize").mkdir()
            (tmp_path / "synthesize" / "answers.jsonl").write_bytes(whole[: len(whole) // 2])
        done = gatt(stage, "--run", tmp_path, *tiny)
        assert done.returncode == 0, done.stderr
    name = Path("synthesize") / "dialogues.jsonl"
    assert (tmp_path / name).read_text() == (finished / name).read_text()
    keys = [
        (r["dialogue"], r["turn"], r["candidate"])
        for _, r in read_jsonl(tmp_path / "synthesize" / "answers.jsonl")
    ]
    assert len(keys) == len(set(keys))


def test_training_cut_off_goes_on_and_gives_the_same_adapter(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = tmp_path / "train" / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors"
    stamp = before.stat().st_mtime_ns
    (tmp_path / "train" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "train" / "adapter")
    (
        tmp_path / "train" / "checkpoints" / "checkpoint-2" / "complete"
    ).unlink()  # as if it was cut off while it was written
    assert gatt("train", "--run", tmp_path, *tiny).returncode == 0
    assert before.stat().st_mtime_ns == stamp  # step 1 was not repeated
    name = Path("train") / "adapter" / "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_that_is_asked_to_stop_saves_and_goes_on(
    number: signal.Signals, finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    longer = [*tiny, "--set", "train.max_steps=30", "--set", "train.save_steps=50"]
    adapters = []
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        shutil.copytree(finished, folder)
        if stopped:
            command = [sys.executable, "-m", "pipeline", "train", "--run", str(folder), *longer]
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
                assert running.stderr
                said = []
                for line in running.stderr:
                    said.append(line)
                    if "train: steps" in line and "Stopped" not in line:
                        running.send_signal(number)
                        break
                said += running.stderr
            assert running.returncode == 1
            assert "Stopped after step" in said[-1], said
        done = gatt("train", "--run", folder, *longer)
        assert done.returncode == 0, done.stderr
        adapters.append((folder / "train" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    """The whole command under `accelerate launch`: checkpoints, held-out answers, one run folder."""
    import numpy as np
    from safetensors.numpy import load_file

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "train")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    command = [*launch, "-m", "pipeline", "train", "--run", str(tmp_path), *tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((folder / "train" / "losses.json").read_text())
        for folder in (tmp_path, finished)
    )
    assert ours == pytest.approx(
        theirs, rel=3e-2
    )  # a hundred tokens in bfloat16; in float32 they are equal (test_trainer.py)
    assert (tmp_path / "train" / "manifest.json").exists() and len(
        list(read_jsonl(tmp_path / "train" / "validation.jsonl"))
    ) == 2
    name = Path("train") / "adapter" / "adapter_model.safetensors"
    adapters = [load_file(folder / name) for folder in (tmp_path, finished)]
    ours_all, theirs_all = (
        np.concatenate([m.ravel() for m in adapter.values()]) for adapter in adapters
    )
    assert ours_all @ theirs_all > 0.99 * np.linalg.norm(ours_all) * np.linalg.norm(theirs_all)
    assert gatt("train", "--run", tmp_path, *tiny).stderr.strip().endswith("train: done already")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX")
def test_ten_kills_lose_nothing(
    finished: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    moments = random.Random(1)
    manifests: dict[Path, int] = {}
    for _ in range(10):
        command = [sys.executable, "-m", "pipeline", "run", "--run", str(tmp_path), *tiny]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(1, 30))
        with contextlib.suppress(ProcessLookupError):  # it had finished
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        stages = [
            p for p in tmp_path.glob("*/manifest.json") if p.parent.name != "report"
        ]  # rendered anew by every run
        now = {p: p.stat().st_mtime_ns for p in stages}
        assert manifests.items() <= now.items()  # a finished stage is not repeated
        manifests = now
    done = gatt("run", "--run", tmp_path, *tiny)
    assert done.returncode == 0, done.stderr
    logs = {
        "synthesize/answers": ("dialogue", "turn", "candidate"),
        "evaluate/replies": ("arm", "dialogue", "turn", "probe"),
    }
    for name, key in logs.items():
        ours, theirs = (
            [row for _, row in read_jsonl(folder / f"{name}.jsonl")]
            for folder in (tmp_path, finished)
        )
        keys = [tuple(row[k] for k in key) for row in ours]
        assert len(keys) == len(set(keys))  # nothing generated twice
        assert sorted(map(str, ours)) == sorted(
            map(str, theirs)
        )  # nothing lost, and the same as without a kill


def test_labels_cover_answers_and_their_end_of_turn_only(
    finished: Path, gatt: Gatt, tiny: list[str]
) -> None:
    shown = gatt("train", "--run", finished, "--show-labels", *tiny).stdout
    example = next(read_jsonl(finished / "synthesize" / "dialogues.jsonl"))[1]
    learned = [piece.split("]")[0] for piece in shown.split("[")[1:]]
    answers = [m["content"] + "<|im_end|>" for m in example["messages"] if m["role"] == "assistant"]
    assert learned == answers


def test_the_tuned_file_answers(finished: Path) -> None:
    from pipeline.inference.batch_engine import BatchEngine
    from pipeline.records import Request

    with BatchEngine(finished / "export" / "tuned-Q8_0.gguf", 1, 256) as llama:
        said = llama.complete(
            Request(({"role": "user", "content": "What color is the sky?"},), 1, 16)
        )
    assert said.tokens and said.text
