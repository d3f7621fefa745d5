"""Read an instruction in the user's own words, and its checks, from an entry of a recipe or a file.

An entry is a table with a `text`:

    {text = "You are Ziggy. Never mention prices.", checks = [{not_regex = "[$€]"}]}

A check is {KIND = VALUE} or {kind = KIND, value = VALUE}. Which kinds there are is not known here,
but in `gatt.constraints`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain, count
from pathlib import Path

from pipeline.errors import did_you_mean
from pipeline.files import without_surrogates
from pipeline.records import Constraint, CustomInstruction

PLACES = ("first", "system")
_FIELDS = tuple(field.name for field in fields(CustomInstruction))
_CHECK_EXAMPLE = '{regex = "^Ziggy:"} or {kind = "max_words", value = "30"}'


def parse_pool_entry(entry: object, folder: Path) -> object:
    """Return an entry of `instructions.pool`; one without a text, a constraint, as it is.

    Raises:
        ValueError: as `parse_custom_instruction`, or the entry has neither a text nor a kind.
    """
    if isinstance(entry, str):
        raise ValueError(f"expected a table: {{text = {json.dumps(entry, ensure_ascii=False)}}}.")
    if not isinstance(entry, Mapping):
        return entry
    if "kind" in entry and "text" not in entry:
        if unknown := [key for key in entry if key not in ("kind", "value")]:
            raise ValueError(f"unknown key {unknown[0]!r} next to kind; expected kind and value.")
        return entry
    return parse_custom_instruction(entry, folder)


def parse_custom_instruction(entry: Mapping[str, object], folder: Path) -> CustomInstruction:
    """Return the instruction of a table; functions of its checks are looked for in `folder`, too.

    Raises:
        ValueError: there is no text, a key or a value is not known, or a check is not valid; the
            message is for the user.
    """
    for key in entry:
        if key not in _FIELDS:
            hint = did_you_mean(str(key), _FIELDS) or f"Known keys: {', '.join(_FIELDS)}."
            raise ValueError(f"unknown key {key!r}. {hint}")
    text, short, label = (_text_of(entry, key) for key in ("text", "short", "label"))
    if not text:
        raise ValueError(
            'there is no text. Expected the instruction: {text = "Answer like a pirate."}'
        )
    place, checks = entry.get("place", "first"), entry.get("checks", ())
    if place not in PLACES:
        raise ValueError(f'place = {place!r}; expected "first" (message) or "system" (message).')
    if not isinstance(checks, list | tuple):
        raise ValueError(f"checks = {checks!r}; expected a list of {_CHECK_EXAMPLE}.")
    return CustomInstruction(
        text=text,
        short=short,
        checks=tuple(_parse_check(check, folder) for check in checks),
        place="system" if place == "system" else "first",
        label=label,
    )


def with_distinct_names(
    instructions: Sequence[CustomInstruction], taken: Collection[str] = ()
) -> tuple[CustomInstruction, ...]:
    """Return the different ones of some instructions, numbered where a name is `taken` or used."""
    distinct = tuple(dict.fromkeys(instructions))
    used, tried = set(taken), Counter[str]()
    numbered = []
    for instruction in distinct:
        name = instruction.name
        further = (f"{name} ({number})" for number in count(max(2, tried[name] + 1)))
        label = next(label for label in chain([name], further) if label not in used)
        used.add(label)
        tried[name] += 1
        same = label == name
        numbered.append(instruction if same else replace(instruction, label=label))
    return tuple(numbered)


def _text_of(entry: Mapping[str, object], key: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} = {value!r}; expected a text.")
    return without_surrogates(value).replace("\r\n", "\n").strip()


def _parse_check(check: object, folder: Path) -> Constraint:
    """Return the constraint of a check: {KIND = VALUE}, {kind, value}, or "KIND" without a value.

    Arguments of {ifeval = NAME, arguments = {...}} become a part of the value, as JSON.
    """
    if isinstance(check, Constraint):
        return check
    if isinstance(check, str):
        check = {"kind": check}
    if not isinstance(check, Mapping) or not check:
        raise ValueError(f"a check is {check!r}; expected {_CHECK_EXAMPLE}.")
    keys = dict(check)
    arguments = keys.pop("arguments", None)
    kind, value = keys.pop("kind", None), keys.pop("value", "")
    if kind is None and len(keys) == 1 and value == "":
        (kind, value), keys = keys.popitem(), {}
    if keys or not isinstance(kind, str):
        raise ValueError(f"a check is {dict(check)!r}; expected one kind, as in {_CHECK_EXAMPLE}.")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"the check {kind} has the value {value!r}; expected a text.")
    value = str(value)
    if arguments is not None:
        if kind != "ifeval" or not isinstance(arguments, Mapping):
            raise ValueError(f"arguments = {arguments!r}; expected a table, next to ifeval = NAME.")
        value = f"{value} {_json_of(arguments)}"
    if kind in ("regex", "not_regex"):
        _require_pattern(kind, value)
    return Constraint(kind, _located(value, folder) if kind == "function" else value)


def _json_of(arguments: Mapping[str, object]) -> str:
    try:
        return json.dumps(dict(arguments), sort_keys=True, ensure_ascii=False)
    except TypeError as error:  # TOML has dates and times, too
        raise ValueError(f"arguments: {error}. Expected texts, numbers and lists.") from error


def compiled_pattern(value: str) -> re.Pattern[str]:
    """Return a compiled pattern.

    Raises:
        ValueError: it is not a regular expression; the message is for the user.
    """
    try:
        with warnings.catch_warnings():
            # Such as "[[a]", which a later version of Python may read in another way.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{value!r} is not a regular expression: {error}. Correct it, or escape the signs that "
            "are meant literally with a backslash."
        ) from error


def _require_pattern(kind: str, value: str) -> None:
    try:
        compiled_pattern(value)
    except ValueError as error:
        raise ValueError(f"{kind} = {error}") from error


def _located(value: str, folder: Path) -> str:
    """Return "module:function" with the module's file in place of its name if `folder` has it.

    The recipe of a run is read again from the folder of the run.
    """
    module, _, function = value.rpartition(":")
    if not module or not function.isidentifier():
        raise ValueError(
            f'function = {value!r}; expected "module:function", as "checks:is_polite".'
        )
    path = module.replace(".", "/")
    names = (
        [str(Path(module).expanduser())]
        if module.endswith(".py")
        else [f"{path}.py", f"{path}/__init__.py"]
    )
    files = [file for name in names if (file := folder / name).is_file()]
    return f"{files[0].resolve()}:{function}" if files else value
