"""Read and write recipe files; name the key that is wrong.

Precedence: default < recipe file < `--quick` < `--set KEY=VALUE`. An unknown key is an error that
names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.items
from pydantic import BaseModel, ValidationError
from tomlkit.exceptions import TOMLKitError

from pipeline.errors import GattError, did_you_mean
from pipeline.files import decode_text, without_surrogates
from pipeline.recipe import Recipe
from pipeline.records import Constraint, CustomInstruction

QUICK = (
    "dialogues.train=40",
    "dialogues.turns=4",
    "dialogues.validation=2",
    "train.max_steps=12",
    "synthesize.max_tokens=48",
    "evaluate.dialogues=6",
    "evaluate.turns=8",
    "evaluate.max_tokens=48",
    "evaluate.suite_dialogues=2",
)
"""Overrides of `--quick`: the same run in miniature. Its report is marked as shortened."""

_RENAMED = {
    "dialogues.watched": "dialogues.validation",
    "train.own_weight": "train.unedited_weight",
    "train.steps": "train.max_steps",
    "train.batch": "train.batch_size",
    "train.tokens": "train.max_tokens_per_micro_batch",
    "train.targets": "train.target_modules",
    "train.schedule": "train.lr_scheduler_type",
    "train.warmup": "train.warmup_ratio",
    "train.mix": "train.replay_data",
    "train.mix_share": "train.replay_ratio",
    "train.adapter": "train.init_adapter",
    "train.stop_when": "train.early_stop_adherence",
    "export.merge_onto": "export.merge_base",
    "export.same_tokens": "export.verify_tokenizer",
    "export.importance_tokens": "export.imatrix_tokens",
    "evaluate.more": "evaluate.suite_dialogues",
    "evaluate.more_turns": "evaluate.suite_turns",
    "evaluate.others": "evaluate.extra_models",
    "evaluate.sequences": "evaluate.max_parallel",
    "synthesize.sequences": "synthesize.max_parallel",
    "synthesize.sentences": "synthesize.max_sentences",
}
"""Keys of earlier versions whose new name is not the nearest one; an error names it."""
_REMOVED = ("train.beta", "train.rollouts", "train.rollout_steps", "train.rollout_first_tokens")
"""Keys of earlier versions that have no successor."""


def load_recipe(path: Path | None, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file (or the defaults) and apply `KEY=VALUE` overrides.

    Raises:
        GattError: no such file, not TOML, an unknown key, or a value of the wrong type; the
            message names the key.
    """
    data = read_toml(path) if path is not None else {}
    folder = path.parent if path is not None else Path()
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise GattError(f"{path or 'recipe'}: {_explain(error)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file that a user has written.

    Raises:
        GattError: it cannot be read, or is not TOML in UTF-8.
    """
    try:
        return dict(tomlkit.parse(decode_text(path.read_bytes(), path)).unwrap())
    except FileNotFoundError as error:
        raise GattError(f"No recipe at {path}. `gatt init {path}` writes one.") from error
    except OSError as error:
        raise GattError(
            f"Cannot read {path} ({error.strerror}). Expected a recipe, a TOML file; `gatt init "
            "recipe.toml` writes one."
        ) from error
    except TOMLKitError as error:
        raise GattError(
            f"{path} is not valid TOML: {error}. Correct it, or start anew with `gatt init`."
        ) from error


def _override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; a value that is not valid TOML is taken as a string."""
    if without_surrogates(override) != override:
        raise GattError(
            f"--set {without_surrogates(override)}: it has bytes that are not UTF-8, which a "
            "recipe cannot hold. Rename the file, or make a link with another name."
        )
    name, equals, text = override.partition("=")
    if not equals:
        raise GattError(
            f"--set {override}: expected KEY=VALUE, for example --set train.max_steps=20."
        )
    try:
        value: Any = tomlkit.value(text).unwrap()
    except (TOMLKitError, ValueError):
        value = text
    *sections, key = name.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise GattError(
                f"--set {override}: {section} is not a section. `gatt init` shows every key."
            )
    data[key] = value


def _explain(error: ValidationError) -> str:
    """Return the first problem in one line; an unknown key comes with the nearest valid one."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "value_error":  # one of our own, which says everything
        return f"{place}: {problem['ctx']['error']}"
    if problem["type"] != "extra_forbidden":
        message = f"{place} = {problem['input']!r}: {problem['msg']}."
        return f"{message} `gatt init` lists every key with its meaning."
    section: type[BaseModel] = Recipe
    for name in problem["loc"][:-1]:
        section = type(getattr(section(), str(name)))
    if new := _RENAMED.get(place):
        return f"unknown key {place!r}: it is now called {new!r}."
    if place in _REMOVED:
        return f"unknown key {place!r}: it was removed. Delete the lines of {', '.join(_REMOVED)}."
    known = ", ".join(section.model_fields)
    hint = did_you_mean(str(problem["loc"][-1]), section.model_fields)
    return f"unknown key {place!r}. {hint or f'Known keys: {known}.'}"


def recipe_toml(recipe: Recipe, *, comments: bool = True) -> str:
    """Return the recipe as TOML, with the help of each key above it if `comments`."""
    document = tomlkit.document()
    _fill(document, recipe, comments=comments)
    return tomlkit.dumps(document)


def _fill(
    table: tomlkit.TOMLDocument | tomlkit.items.Table, section: BaseModel, *, comments: bool
) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            child = tomlkit.table()
            if comments:
                child.comment((type(value).__doc__ or "").split("\n")[0])
            _fill(child, value, comments=comments)
            table.add(tomlkit.nl())
            table.add(name, child)
            continue
        if comments and field.description:
            table.add(tomlkit.comment(" ".join(field.description.split())))
        table.add(name, _toml_value(value))


def _toml_value(value: object) -> object:
    if not isinstance(value, tuple):
        return value
    array = tomlkit.array()
    for item in value:
        is_entry = isinstance(item, Constraint | CustomInstruction)
        array.append(_table(asdict(item)) if is_entry else item)
    return array.multiline(multiline=any(map(is_dataclass, value)))


def _table(values: Mapping[str, object]) -> tomlkit.items.InlineTable:
    """Return what is not empty of a constraint, or of an instruction with its checks."""
    row = tomlkit.inline_table()
    for key, value in values.items():
        if isinstance(value, tuple):
            value = [_table(item) for item in value]
        if value:
            row.append(key, value)
    return row
