"""Wrong input: one clear line, a status that is not zero, nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Gatt


def _refused(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("gatt: ")
    for words in said:
        assert words in line


def test_unknown_key_names_the_nearest(tmp_path: Path, gatt: Gatt) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nrnk = 8\n")
    _refused(gatt("run", recipe, "--run", tmp_path / "run"), "train.rnk", "'rank'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"turns": ["a"]}\n{"turns": [\n', "line 2"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "two user turns in a row",
        ),
        ("", "empty"),
    ],
)
def test_broken_dialogues(content: str, said: str, tmp_path: Path, gatt: Gatt) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    _refused(gatt("run", "--run", tmp_path / "run", "--set", f"dialogues.source='{file}'"), said)


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(tmp_path: Path, gatt: Gatt) -> None:
    from pipeline.recipe import Recipe
    from pipeline.recipe_file import load_recipe

    file = tmp_path / "r.toml"
    assert gatt("init", file).returncode == 0
    assert load_recipe(file) == Recipe()
    _refused(gatt("init", file), "exists already")


def test_unknown_model(gatt: Gatt, tmp_path: Path, tiny: list[str]) -> None:
    _refused(
        gatt("run", "--run", tmp_path, *tiny, "--set", "model=smollm2-135n"),
        "Did you mean 'smollm2-135m'",
    )


def test_hub_without_a_network(gatt: Gatt, tmp_path: Path, tiny: list[str]) -> None:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    for model in ("llama-3.2-1b", "somebody/something"):
        done = gatt("run", "--run", tmp_path / "run", *tiny, "--set", f"model={model}", env=offline)
        _refused(done, "from the Hub", "these work: the preset smollm2-135m")


def test_broken_gguf(base: Path, gatt: Gatt, tmp_path: Path) -> None:
    short, other = tmp_path / "short.gguf", tmp_path / "other.gguf"
    short.write_bytes(base.read_bytes()[:50_000_000])
    other.write_bytes(b"not a model at all")
    _refused(gatt("chat", short), "cut short")
    _refused(gatt("chat", other), "not a GGUF")


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is of POSIX")
def test_too_little_memory(base: Path, gatt: Gatt) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))

    _refused(
        gatt("chat", base, preexec_fn=limit, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}),
        "Too little memory",
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_full_disk(tmp_path: Path, gatt: Gatt, tiny: list[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no mounting here")
    try:
        _refused(gatt("run", "--run", disk / "run", *tiny), "disk space")
    finally:
        subprocess.call(["umount", disk])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_read_only_run_folder(tmp_path: Path, gatt: Gatt) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], stderr=subprocess.DEVNULL
    ):
        pytest.skip("no mounting here")
    try:
        _refused(gatt("run", "--run", disk), "Cannot write", "Read-only")
    finally:
        subprocess.call(["umount", disk])


def test_run_folder_that_cannot_be_written(tmp_path: Path, gatt: Gatt) -> None:
    (tmp_path / "file").write_text("x")
    _refused(gatt("run", "--run", tmp_path / "file" / "run"), "Cannot write")


def test_stage_without_its_input(tmp_path: Path, gatt: Gatt) -> None:
    _refused(gatt("report", "--run", tmp_path), "Run the stages before it")


def test_help_is_quick_and_loads_no_heavy_library() -> None:
    check = "import sys, pipeline.cli; sys.exit(bool({'torch', 'llama_cpp', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    assert subprocess.call([sys.executable, "-c", check]) == 0
    start = time.monotonic()
    subprocess.check_output([sys.executable, "-m", "pipeline", "--help"])
    assert (
        time.monotonic() - start < 3
    )  # ten times the bar: a loaded machine must not fail the tests
