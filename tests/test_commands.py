"""The commands of a run: which recipe they take, and which options they refuse or pass on."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from support.cli import Completed, call_gatt

from pipeline.files import write_text
from pipeline.gatt.assignment import AssignedDialogue, write_splits
from pipeline.recipe import Recipe
from pipeline.recipe_file import QUICK, load_recipe, recipe_toml
from pipeline.records import Dialogue
from pipeline.run import _settings
from pipeline.run_dir import RunDir


def _save_recipe(folder: Path, *overrides: str) -> RunDir:
    run_dir = RunDir(folder)
    run_dir.save_recipe(load_recipe(None, overrides))
    return run_dir


def _saved(run_dir: RunDir) -> Recipe:
    return load_recipe(run_dir.recipe)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Return the recipes with which stages are executed, which do nothing else but save them."""
    recipes: list[Recipe] = []

    def execute(name: str, settings: Recipe, run_dir: RunDir) -> None:
        recipes.append(settings)
        run_dir.save_recipe(settings)

    monkeypatch.setattr("pipeline.cli.stages.execute_stage", execute)
    return recipes


# --- gatt run ---


@pytest.fixture
def run_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Return an empty run in which `gatt run` has the first stage only."""
    monkeypatch.setattr("pipeline.run.STAGES", ("instructions",))
    return RunDir(tmp_path / "run")


def _run(run_dir: RunDir, *words: object) -> Completed:
    done = call_gatt("run", *words, "--run", run_dir.path)
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_continues_with_its_saved_recipe(run_instructions: RunDir, tmp_path: Path) -> None:
    run_dir, recipe = run_instructions, tmp_path / "my.toml"
    write_text(recipe, recipe_toml(load_recipe(None, ("dialogues.train=20",))))
    _run(run_dir, recipe, "--set", "seed=7")
    before = run_dir.recipe.read_bytes()
    again = _run(run_dir)
    assert f"Recipe: {run_dir.recipe}, saved in this folder." in again.stderr
    assert "instructions: done already" in again.stderr
    assert run_dir.recipe.read_bytes() == before
    changed = _run(run_dir, "--set", "dialogues.turns=2")
    assert "this has changed: the recipe" in changed.stderr
    recipe_now = _saved(run_dir)
    assert (recipe_now.seed, recipe_now.dialogues.train, recipe_now.dialogues.turns) == (7, 20, 2)


def test_a_prompt_with_an_emoji_in_its_name_is_baked(
    run_instructions: RunDir, tmp_path: Path
) -> None:
    prompt = tmp_path / "ahoy 🏴.txt"
    prompt.write_text("You are a pirate.")
    _run(run_instructions, "--bake", prompt)
    assert _saved(run_instructions).instructions.bake == str(prompt)


def test_a_model_with_an_emoji_in_its_name_is_compared(
    executed: list[Recipe], tmp_path: Path
) -> None:
    done = call_gatt("evaluate", "--compare-with", "rival 🏴.gguf", "--run", tmp_path)
    assert done.returncode == 0
    assert executed[0].evaluate.extra_models == ("rival 🏴.gguf",)


@pytest.mark.parametrize("overrides", [(), ("seed=7",)])
def test_the_demo_in_miniature_is_followed_by_the_demo(
    run_instructions: RunDir, overrides: tuple[str, ...]
) -> None:
    words = [word for override in overrides for word in ("--set", override)]
    _run(run_instructions, "--quick", *words)
    assert "done already" in _run(run_instructions, "--quick", *words).stderr
    assert _saved(run_instructions) == load_recipe(None, (*QUICK, *overrides))
    assert "Recipe:" not in _run(run_instructions, *words).stderr
    assert _saved(run_instructions) == load_recipe(None, overrides)


def test_a_recipe_of_the_user_in_miniature_stays_the_users(run_instructions: RunDir) -> None:
    _run(run_instructions, "--set", "seed=7")
    _run(run_instructions, "--quick")
    assert _saved(run_instructions) == load_recipe(None, ("seed=7", *QUICK))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.init_adapter=none", "No adapter in none"),
        ('evaluate.extra_models=["none.gguf"]', "evaluate.extra_models: no file at none.gguf"),
        ("evaluate.judge=nobody", "Unknown model 'nobody'"),
        ("synthesize.judge=nobody", "Unknown model 'nobody'"),
    ],
)
def test_what_later_stages_read_is_missed_before_any_work(
    override: str, problem: str, tmp_path: Path
) -> None:
    done = call_gatt("instructions", "--run", tmp_path, "--set", override)
    assert done.returncode == 1 and problem in done.stderr
    assert not RunDir(tmp_path).assignments.exists()


# --- options that do not apply, or undo the recipe ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapter", "my-lora"), "--adapter needs --model"),
        (("--out", "export"), "--out needs --model"),
        (("--converter", "convert_hf_to_gguf.py"), "--converter needs --model"),
        (("my.toml", "--model", "none"), "my.toml cannot be used with --model"),
        (("--model", "none", "--set", "seed=2"), "--set cannot be used with --model"),
        (("--model", "none", "--quick"), "--quick cannot be used with --model"),
        (("--model", "none", "--run", "runs/demo"), "--run cannot be used with --model"),
    ],
)
def test_an_option_of_the_other_kind_of_export_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call_gatt("export", *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gatt: {message}")
    assert not list(tmp_path.iterdir())


def test_an_option_undoes_what_the_saved_recipe_says(
    executed: list[Recipe], tmp_path: Path
) -> None:
    _save_recipe(
        tmp_path,
        "train.early_stop_adherence=0.95",
        "evaluate.adapter=mine.gguf",
        "evaluate.judge=none",
    )
    call_gatt("train", "--run", tmp_path, "--early-stop", 0)
    call_gatt("evaluate", "--run", tmp_path, "--adapter-scale", 0.8)
    call_gatt("evaluate", "--run", tmp_path, "--adapter", "", "--judge", "")
    trained, scaled, undone = executed
    assert trained.train.early_stop_adherence == 0
    assert (scaled.evaluate.adapter, scaled.evaluate.adapter_scale) == ("mine.gguf", 0.8)
    assert (undone.evaluate.adapter, undone.evaluate.judge) == ("", "")


def test_the_scale_of_no_adapter_is_refused(tmp_path: Path) -> None:
    done = call_gatt("evaluate", "--run", tmp_path, "--adapter-scale", 0.8)
    assert done.returncode == 1
    assert "--adapter-scale needs --adapter, or evaluate.adapter" in done.stderr
    assert not list(tmp_path.iterdir())
    done = call_gatt("chat", "smollm2-135m", "--adapter-scale", 0.8)
    assert done.returncode == 1
    assert "--adapter-scale needs --adapter." in done.stderr


def test_longer_dialogues_than_the_run_has_are_refused_and_not_saved(tmp_path: Path) -> None:
    run_dir = _save_recipe(tmp_path)
    dialogue = AssignedDialogue(dialogue=Dialogue("d", "sea", ("Why?",) * 21))
    write_splits(run_dir.assignments, {"train": [], "evaluation": [dialogue]})
    before = run_dir.recipe.read_bytes()
    done = call_gatt("evaluate", "--run", tmp_path, "--set", "evaluate.turns=60")
    assert done.returncode == 1
    assert "have 21 turns. `gatt evaluate --run" in done.stderr
    assert run_dir.recipe.read_bytes() == before


def test_a_finished_training_that_is_restarted_begins_at_step_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, stage = _save_recipe(tmp_path), import_module("pipeline.stages.train")
    recipe = _saved(run_dir)
    write_text(run_dir.examples, "{}\n")
    run_dir.claim("train", _settings(stage, recipe), stage.inputs(recipe, run_dir))
    (run_dir.checkpoints / "checkpoint-1").mkdir(parents=True)
    write_text(run_dir.validation, "{}\n")
    run_dir.finish("train", _settings(stage, recipe), stage.inputs(recipe, run_dir), 1.0)
    trained: list[bool] = []
    monkeypatch.setattr(stage, "run", lambda *_: trained.append(run_dir.checkpoints.exists()))
    assert "train: done already" in call_gatt("train", "--run", tmp_path).stderr
    assert trained == []
    assert call_gatt("train", "--run", tmp_path, "--restart").returncode == 0
    assert trained == [False]
    assert not run_dir.validation.exists()
    assert run_dir.manifest("train")
