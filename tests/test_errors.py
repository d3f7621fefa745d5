"""Wrong input: one clear line, a status that is not zero, nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cli import Completed, Gatt, call_gatt

from pipeline.data.splits import split_dialogues
from pipeline.errors import GattError
from pipeline.gatt.assign import ConstraintPool
from pipeline.recipe import Evaluate, Export, Recipe, Train
from pipeline.recipe_file import _RENAMED, load_recipe
from pipeline.records import Constraint
from pipeline.run import open_run, run_stage
from pipeline.run_dir import RunDir
from pipeline.stages import instructions, train
from pipeline.stages.instructions import check_pool, require_instruction
from pipeline.training import job

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root"
)
AHOY = Constraint("opening", "Ahoy!")


def _assert_refused(done: Completed, *phrases: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("gatt: ")
    for phrase in phrases:
        assert phrase in line


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory at `folder`, or skip the test."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.call(command, stderr=subprocess.DEVNULL):
        pytest.skip("mounting is not possible here")
    try:
        yield folder
    finally:
        subprocess.call(["umount", folder])


def test_an_unknown_key_names_the_nearest(tmp_path: Path, gatt: Gatt) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nrnk = 8\n")
    _assert_refused(gatt("run", recipe, "--run", tmp_path / "run"), "train.rnk", "'rank'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("old", "new"), _RENAMED.items())
def test_a_renamed_key_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(GattError, match=f"{old!r}: it is now called {new!r}"):
        load_recipe(None, (f"{old}=1",))
    section, _, key = new.partition(".")
    assert key in type(getattr(Recipe(), section)).model_fields


def test_a_removed_key_is_named_as_such(tmp_path: Path) -> None:
    recipe = tmp_path / "old.toml"
    recipe.write_text('[train]\nrollouts = "none"\n', encoding="utf-8")
    with pytest.raises(GattError, match=r"'train\.rollouts': it was removed\. Delete the lines of"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"turns": ["a"]}\n{"turns": [\n', "line 2"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}\n',
            "two user turns in a row",
        ),
        ("", "empty"),
    ],
)
def test_broken_dialogues(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    source = f"dialogues.source='{file}'"
    _assert_refused(call_gatt("run", "--run", tmp_path / "run", "--set", source), message)


def test_too_few_dialogues() -> None:
    recipe = Recipe(evaluate=Evaluate(dialogues=5000))
    with pytest.raises(GattError, match="too few to evaluate on 5000"):
        split_dialogues(recipe)


def test_an_empty_pool() -> None:
    with pytest.raises(GattError, match=r"instructions\.pool.* empty"):
        require_instruction(ConstraintPool(()))


def test_a_merge_into_4_bits_after_a_training_in_16() -> None:
    recipe = Recipe(export=Export(merge_base="nf4"))
    with pytest.raises(GattError, match=r"smollm2-135m is trained in 16 bits. Set \"auto\""):
        instructions.run(recipe, RunDir(Path("unused")))


def test_training_cannot_start_from_the_adapter_that_it_moves_aside(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    recipe = Recipe(train=Train(init_adapter=str(run_dir.adapter)))
    with pytest.raises(GattError, match=r"is in the run .*Use another --run, or copy the adapter"):
        train.inputs(recipe, run_dir)
    assert train.inputs(recipe, RunDir(tmp_path / "other"))


def test_a_logger_that_is_not_installed_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "find_spec", lambda package: package == "tensorboardX")
    job.require_reporters(Train(report_to=("tensorboard",)))
    recipe = Recipe(train=Train(report_to=("tensorboard", "wandb")))
    with pytest.raises(GattError, match=r"not installed\. Run `pip install wandb`"):
        instructions.run(recipe, RunDir(Path("unused")))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_an_error_of_the_recipe(seed: int) -> None:
    with pytest.raises(GattError, match="seed"):
        load_recipe(None, (f"seed={seed}",))


def test_a_constraint_that_needs_a_judge() -> None:
    pool = ConstraintPool((AHOY, Constraint("style", "talk like a pirate")))
    with pytest.raises(GattError, match=r"talk like a pirate.*evaluate\.judge"):
        check_pool(pool, Evaluate())
    check_pool(pool, Evaluate(judge="smollm2-135m"))


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    assert call_gatt("init", file).returncode == 0
    assert load_recipe(file) == Recipe()
    _assert_refused(call_gatt("init", file), "exists already")


def test_an_unknown_model(tmp_path: Path, tiny: list[str]) -> None:
    done = call_gatt("run", "--run", tmp_path, *tiny, "--set", "model=smollm2-135n")
    _assert_refused(done, "Did you mean 'smollm2-135m'")


@pytest.mark.parametrize("model", ["llama-3.2-1b", "somebody/something"])
def test_the_hub_without_a_network(model: str, gatt: Gatt, tmp_path: Path, tiny: list[str]) -> None:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = gatt("run", "--run", tmp_path / "run", *tiny, "--set", f"model={model}", env=offline)
    _assert_refused(done, "from the Hub", "use the preset smollm2-135m")


def test_a_broken_gguf(base: Path, tmp_path: Path) -> None:
    short, text = tmp_path / "short.gguf", tmp_path / "text.gguf"
    with base.open("rb") as model:
        short.write_bytes(model.read(50_000_000))
    text.write_bytes(b"not a model at all")
    _assert_refused(call_gatt("chat", short), "cut short")
    _assert_refused(call_gatt("chat", text), "not a GGUF")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_too_little_memory(base: Path, gatt: Gatt) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = gatt("chat", base, preexec_fn=limit, env=environment)
    _assert_refused(done, "Too little memory")


@needs_root
def test_a_full_disk(tmp_path: Path, gatt: Gatt, tiny: list[str]) -> None:
    with _mounted(tmp_path / "disk", "size=1m") as disk:
        _assert_refused(gatt("run", "--run", disk / "run", *tiny), "disk space")


@needs_root
def test_a_read_only_run_folder(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "ro") as disk:
        _assert_refused(call_gatt("run", "--run", disk), "Cannot write", "Read-only")


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    _assert_refused(call_gatt("run", "--run", tmp_path / "file" / "run"), "Cannot write")


def test_a_stage_without_its_input(tmp_path: Path) -> None:
    _assert_refused(call_gatt("report", "--run", tmp_path), "Run the stages before it")


def test_statistics_without_a_synthesis(tmp_path: Path) -> None:
    _assert_refused(
        call_gatt("synthesize", "--run", tmp_path, "--stats"), "Nothing was synthesized"
    )


def test_a_stage_runs_from_python_and_is_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = open_run(None, tmp_path)
    run_stage("instructions", recipe, run_dir)
    first = run_dir.assignments.stat().st_mtime_ns
    manifest = run_dir.manifest("instructions")
    assert manifest and list(manifest["inputs"]) and manifest["seconds"] >= 0
    capsys.readouterr()
    run_stage("instructions", recipe, run_dir)
    assert capsys.readouterr().err == "instructions: done already\n"
    assert run_dir.assignments.stat().st_mtime_ns == first


def test_a_stage_with_other_settings_runs_again_and_moves_the_old_files(tmp_path: Path) -> None:
    recipe, run_dir = open_run(None, tmp_path)
    run_stage("instructions", recipe, run_dir)
    before = run_dir.assignments.read_bytes()
    run_stage("instructions", *open_run(None, tmp_path, ["seed=2"]))
    assert run_dir.assignments.read_bytes() != before
    (moved,) = tmp_path.glob("instructions.*.old")
    assert RunDir(tmp_path).recipe.read_text().startswith("seed = 2\n")
    assert (moved / "assignments.json").read_bytes() == before


def test_help_is_quick_and_loads_no_heavy_library() -> None:
    heavy = {"torch", "llama_cpp", "matplotlib", "pydantic"}
    check = f"import sys, pipeline.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.call([sys.executable, "-c", check]) == 0
    start = time.monotonic()
    subprocess.check_output([sys.executable, "-m", "pipeline", "--help"])
    # Ten times what it takes: a busy machine must not fail the test.
    assert time.monotonic() - start < 3
