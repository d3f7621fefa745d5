"""Run the stages of a recipe, each only if its settings or its inputs have changed.

From Python, a stage with its caching is two lines:

    recipe, run_dir = open_run(Path("my.toml"), Path("runs/mine"))
    run_stage("synthesize", recipe, run_dir)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.run_dir import STAGES, RunDir
from pipeline.system import is_main_process


def open_run(
    recipe_file: Path | None,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    reuse_recipe: bool = True,
) -> tuple[Recipe, RunDir]:
    """Resolve the recipe, save it in the run folder, and log what was overridden.

    Without a `recipe_file`, the recipe saved in the folder is used, or the defaults if there is
    none; with `reuse_recipe=False` always the defaults.

    Raises:
        GattError: no such recipe, an error in it, or a folder that cannot be written.
    """
    run_dir = RunDir(folder)
    if recipe_file is None and reuse_recipe and run_dir.recipe.is_file():
        recipe_file = run_dir.recipe
    recipe = load_recipe(recipe_file, tuple(overrides))
    if is_main_process():
        run_dir.save_recipe(recipe)
        if overrides:
            log(f"Overridden: {', '.join(overrides)}")
    return recipe, run_dir


def run_stages(recipe: Recipe, run_dir: RunDir) -> None:
    """Run every stage in order; those that are up to date are skipped.

    Raises:
        GattError: as `run_stage`.
    """
    for name in STAGES:
        run_stage(name, recipe, run_dir)


def run_stage(name: str, recipe: Recipe, run_dir: RunDir) -> None:
    """Run one of `STAGES` unless it is up to date; its manifest is written last.

    The report is always written again: it takes a second, and its code may have changed.

    Raises:
        GattError: an input file is missing, or the stage cannot do its work.
    """
    stage = import_module(f"pipeline.stages.{name}")
    settings, inputs = _settings(stage, recipe), _existing_inputs(name, stage, recipe, run_dir)
    if name != "report" and run_dir.is_done(name, settings, inputs):
        log(f"{name}: done already")
        return
    start = time.monotonic()
    # Only one of the processes that share a training step writes these files.
    if is_main_process():
        run_dir.claim(name, settings, inputs)
    stage.run(recipe, run_dir)
    if is_main_process():
        # The stage may have written an input that users can edit, so the inputs are listed again.
        seconds = time.monotonic() - start
        run_dir.finish(name, settings, stage.inputs(recipe, run_dir), seconds)


def _existing_inputs(name: str, stage: ModuleType, recipe: Recipe, run_dir: RunDir) -> list[Path]:
    inputs: list[Path] = stage.inputs(recipe, run_dir)
    for path in inputs:
        if not path.exists():
            raise GattError(
                f"`gatt {name}` needs {path}, which does not exist. "
                "Run the stages before it, or `gatt run`."
            )
    return inputs


def _settings(stage: ModuleType, recipe: Recipe) -> str:
    """Return what the stage depends on in the recipe, as text to be hashed."""
    sections = (getattr(recipe, name).model_dump_json() for name in stage.SECTIONS)
    return " ".join([str(recipe.seed), recipe.model, *sections])
