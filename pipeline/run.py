"""Run the stages of a recipe, each only if its settings or its inputs have changed.

From Python, a stage with its caching is two lines:

    recipe, run_dir = open_run(Path("my.toml"), Path("runs/mine"))
    run_stage("synthesize", recipe, run_dir)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.recipe import Recipe, Section
from pipeline.recipe_file import QUICK, load_recipe
from pipeline.run_dir import RECIPE_CHANGE, STAGES, Input, RunDir
from pipeline.system import is_main_process

_ADDED_KEYS = {
    "instructions": ("file", "bake"),
    "synthesize": ("max_thought_tokens", "judge"),
    "train": ("optimizer",),
    "evaluate": ("max_thought_tokens", "recall_dialogues", "reminded_suites"),
}
"""Keys of each section that came after version 0.1, with a default that changes nothing."""
_WITHOUT_EFFECT = ("max_parallel", "report_to")
"""Keys that change how a result is computed or shown, but not the result."""


def open_run(
    recipe_file: Path | None,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    reuse_recipe: bool = True,
) -> tuple[Recipe, RunDir]:
    """Resolve the recipe, and log what was overridden; the first stage saves it in the folder.

    Without a `recipe_file`, the recipe saved in the folder is used, or the defaults if there is
    none; with `reuse_recipe=False` always the defaults.

    Raises:
        GattError: no such recipe, or an error in it.
    """
    run_dir = RunDir(folder)
    if recipe_file is None and reuse_recipe and run_dir.recipe.is_file():
        recipe_file = run_dir.recipe
    recipe = load_recipe(recipe_file, tuple(overrides))
    if overrides and is_main_process():
        log(f"Overridden: {', '.join(overrides)}")
    return recipe, run_dir


def is_quick_demo(folder: Path, overrides: Sequence[str] = ()) -> bool:
    """Return whether the recipe saved in the folder is only the built-in demo in miniature.

    With the same `overrides` it would be `gatt run --quick`, which users run to see that everything
    works. Without --quick, they want all of it.

    Raises:
        GattError: an error in the saved recipe or in the overrides.
    """
    saved = RunDir(folder).recipe
    return saved.is_file() and (
        load_recipe(saved, tuple(overrides)) == load_recipe(None, (*QUICK, *overrides))
    )


def run_stages(recipe: Recipe, run_dir: RunDir) -> None:
    """Run every stage in order; those that are up to date are skipped.

    Raises:
        GattError: as `run_stage`.
    """
    with _locked(run_dir):
        for name in STAGES:
            _run_stage(name, recipe, run_dir)


def run_stage(name: str, recipe: Recipe, run_dir: RunDir) -> None:
    """Run one of `STAGES` unless it is up to date; its manifest is written last.

    The report is always written again: it takes a second, and its code may have changed.

    Raises:
        GattError: an input file is missing, the stage cannot do its work, or another process works
            in the folder.
    """
    with _locked(run_dir):
        _run_stage(name, recipe, run_dir)


def outdated_stages(recipe: Recipe, run_dir: RunDir) -> list[str]:
    """Return the finished stages before the report since which the recipe has changed.

    No model is looked for: it may be missing where a report is written. `instructions` is left out,
    since its settings include those of the evaluation, which may be run again with others.
    """
    return [
        name
        for name in STAGES[1:-1]
        if RECIPE_CHANGE in (run_dir.changes(name, _settings(_stage(name), recipe), []) or ())
    ]


@contextmanager
def _locked(run_dir: RunDir) -> Iterator[None]:
    """Keep other processes from working in the folder until the block ends.

    Only one of the processes that share a training step writes there.
    """
    if not is_main_process():
        yield
        return
    with run_dir.lock():
        yield


def _run_stage(name: str, recipe: Recipe, run_dir: RunDir) -> None:
    stage = _stage(name)
    settings, inputs = _settings(stage, recipe), _existing_inputs(name, stage, recipe, run_dir)
    if is_main_process():
        # Not before the inputs are known to be there: the next command would lack them, too.
        run_dir.save_recipe(recipe)
    changes = run_dir.changes(name, settings, inputs)
    if name == "report":
        run_dir.outdated = outdated_stages(recipe, run_dir)
    elif changes == []:
        log(f"{name}: done already")
        return
    elif changes:
        log(f"{name}: runs again, because this has changed: {', '.join(changes)}")
    start = time.monotonic()
    if is_main_process():
        run_dir.claim(name, settings, inputs)
    try:
        stage.run(recipe, run_dir)
    except BaseException:
        if is_main_process():
            run_dir.interrupt(name, time.monotonic() - start)
        raise
    if is_main_process():
        # The stage may have written an input that users can edit, so the inputs are listed again.
        seconds = time.monotonic() - start
        run_dir.finish(name, settings, stage.inputs(recipe, run_dir), seconds)


def _stage(name: str) -> ModuleType:
    return import_module(f"pipeline.stages.{name}")


def _existing_inputs(name: str, stage: ModuleType, recipe: Recipe, run_dir: RunDir) -> list[Input]:
    inputs: list[Input] = stage.inputs(recipe, run_dir)
    for path in inputs:
        if isinstance(path, Path) and not path.exists():
            raise GattError(
                f"`gatt {name}` needs {path}, which does not exist. "
                "Run the stages before it, or `gatt run`."
            )
    return inputs


def _settings(stage: ModuleType, recipe: Recipe) -> str:
    """Return what the stage depends on in the recipe, as text to be hashed.

    A run of an earlier version stays done: keys that it did not have, or did not count, count once
    they are set.
    """
    texts = [str(recipe.seed), recipe.model]
    for name in stage.SECTIONS:
        section: Section = getattr(recipe, name)
        fields = type(section).model_fields
        section = section.model_copy(
            update={key: fields[key].default for key in _WITHOUT_EFFECT if key in fields}
        )
        unset = {
            key for key in _ADDED_KEYS.get(name, ()) if getattr(section, key) == fields[key].default
        }
        texts.append(section.model_dump_json(exclude=unset))
    for name, key in getattr(stage, "KEYS", ()):
        section = getattr(recipe, name)
        value = getattr(section, key)
        if value != type(section).model_fields[key].default:
            texts.append(f"{name}.{key}={value}")
    return " ".join(texts)
