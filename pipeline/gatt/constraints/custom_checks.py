"""Checks of instructions in the user's own words: patterns, functions, and public verifiers.

A value is a pattern, "module:function" or "file.py:function", or the name of an IFEval or IFBench
instruction with its arguments as JSON: 'length_constraints:number_words {"num_words": 40, ...}'.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from pipeline.console import log
from pipeline.custom_instructions import compiled_pattern
from pipeline.errors import GattError, did_you_mean
from pipeline.records import Constraint, Message

ReplyCheck = Callable[[str, list[Message]], object]
"""A function of a user: called with a reply and the messages before it, returns True or False."""
_SHOWN = 60
"""Characters of a reply that an error shows."""
_RESUME = "Correct it and run the same command again: what is done is not lost."
_NLTK_RESOURCE = re.compile(r"nltk\.download\('(\w+)'\)")
"""How NLTK says which of its data it has not got."""
_TRIED = "This is one short answer."
"""What a verifier is tried on when it is loaded."""
_IFBENCH = "if_verifiable.ifbench.instructions_registry"
_VERIFIERS = ("if_verifiable.ifeval.instructions_registry", _IFBENCH)
"""Modules whose `INSTRUCTION_DICT` has verifiers by their public names."""


class CheckRaisedError(GattError):
    """A check has raised on a reply, which is its cause."""


class _Verifier(Protocol):
    """What an instruction of IFEval or IFBench can do."""

    def get_instruction_args_keys(self) -> list[str]: ...
    def get_instruction_args(self) -> Mapping[str, object] | None: ...
    def build_description(self, **arguments: object) -> str: ...
    def check_following(self, value: str) -> object: ...


@cache
def pattern(value: str) -> re.Pattern[str]:
    """Return a compiled pattern.

    Raises:
        GattError: it is not a regular expression.
    """
    try:
        return compiled_pattern(value)
    except ValueError as error:
        raise GattError(str(error)) from error


def has_match(value: str, text: str) -> bool:
    """Return whether the pattern `value` matches anywhere in the text."""
    return bool(pattern(value).search(text))


def passes_function(value: str, text: str, dialogue: Sequence[Message]) -> bool:
    """Return what the function `value` says of a reply and the messages before it.

    It is not called for a blank reply, which passes no check.

    Raises:
        GattError: there is no such function, it raises, or it returns neither True nor False.
    """
    function = load_function(value)
    if not text.strip():
        return False
    result = _called(value, text, lambda: function(text, [*dialogue]))
    # NumPy's booleans, too. None, of a function that forgets to return, would count as False.
    if type(result).__name__ not in ("bool", "bool_"):
        raise GattError(
            f"The check {value} returned {result!r} on the reply {_beginning(text)}; expected True "
            f"or False. {_RESUME}"
        )
    return bool(result)


def passes_verifier(value: str, text: str) -> bool:
    """Return whether a reply passes an instruction of IFEval or IFBench, in its strict form.

    Some raise on a reply that they did not expect, such as one without a letter. It does not pass.

    Raises:
        GattError: the package, its data, the instruction or an argument is missing.
    """
    try:
        return verifier_passes(value, text)
    except CheckRaisedError as error:
        _log_once(f"ifeval = {value}", type(error.__cause__).__name__)
        return False


def verifier_passes(value: str, text: str) -> bool:
    """Return the same as `passes_verifier`, where that is to be measured.

    Raises:
        CheckRaisedError: the verifier raises.
        GattError: the package, its data, the instruction or an argument is missing.
    """
    verifier = load_verifier(value)
    return bool(text.strip()) and bool(
        _called(f"ifeval = {value}", text, lambda: verifier.check_following(text))
    )


@cache
def _log_once(name: str, error: str) -> None:
    log(f"{name} raised {error} on a reply. Such replies do not pass.")


def _require_nltk_data(name: str, error: BaseException) -> None:
    """Raise a `GattError` if `error` says that data are missing."""
    if resource := _NLTK_RESOURCE.search(str(error)):
        raise GattError(
            f"The check {name} needs data of NLTK, which are not on this machine. Fetch them "
            f"with `python -m nltk.downloader {resource[1]}`, and run the same command again."
        ) from error


def _called(name: str, text: str, check: Callable[[], object]) -> object:
    try:
        return check()
    except (Exception, SystemExit) as error:
        _require_nltk_data(name, error)
        raise CheckRaisedError(
            f"The check {name} raised {_described(error)} on the reply {_beginning(text)}. "
            f"{_RESUME}"
        ) from error


def _described(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    return f"{type(error).__name__} ({reason[:200]})" if reason else type(error).__name__


def _beginning(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def function_files(checks: Iterable[Constraint]) -> list[Path]:
    """Return the Python files of the functions among some checks; a stage depends on them."""
    places = {c.value.rpartition(":")[0] for c in checks if c.kind == "function"}
    files = {file for place in places if (file := _file_of(place))}
    return sorted(file for file in files if file.is_file())


def _file_of(place: str) -> Path | None:
    """Return the file of a module, by its name or its file; None if it has none."""
    if place.endswith(".py"):
        return Path(place)
    # The package around a module is imported, so anything may be raised: `load_function` says more.
    with contextlib.suppress(Exception):
        spec = importlib.util.find_spec(place)
        return Path(spec.origin) if spec and spec.origin else None
    return None


def load_function(value: str) -> ReplyCheck:
    """Return the function "module:function" or "file.py:function".

    Raises:
        GattError: it cannot be imported, or does not take two arguments.
    """
    file = Path(value.rpartition(":")[0])
    return _loaded_function(value, file.stat().st_mtime_ns if file.is_file() else 0)


@cache
def _loaded_function(value: str, changed: int) -> ReplyCheck:
    """Load a function once, and again if its file was `changed`."""
    place, _, name = value.rpartition(":")
    try:
        module = _load_module(place)
    except (Exception, SystemExit) as error:
        raise GattError(
            f"Cannot import {place!r} for the check {value}: {_described(error)}. Expected "
            '"module:function", where the module is next to the recipe or on the Python path.'
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, item in vars(module).items() if inspect.isfunction(item)]
        hint = did_you_mean(name, known) or f"Functions there: {', '.join(known) or 'none'}."
        raise GattError(f"{place} has no function {name!r}. {hint}")
    try:
        inspect.signature(function).bind("", [])
    except ValueError:  # a builtin does not tell its parameters
        pass
    except TypeError as error:
        raise GattError(
            f"The check {value} does not take two arguments ({error}). Expected a function of the "
            "reply (text) and the dialogue (messages before it)."
        ) from error
    return cast(ReplyCheck, function)


def _load_module(place: str) -> ModuleType:
    """Import a module by its name, or a file, whose folder is added to the end of the path."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    file = Path(place)
    unit = file.parent if file.name == "__init__.py" else file  # a package, or a module
    spec = importlib.util.spec_from_file_location(f"gatt_check_{unit.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no file at {file}")
    module = importlib.util.module_from_spec(spec)
    if str(unit.parent) not in sys.path:
        sys.path.append(str(unit.parent))
    sys.modules[spec.name] = module  # for dataclasses and pickle
    spec.loader.exec_module(module)
    return module


@cache
def load_verifier(value: str) -> _Verifier:
    """Return the IFEval or IFBench instruction of a name with arguments.

    Raises:
        GattError: its package or its data are not installed, there is no such instruction, or its
            arguments are not complete or not valid: it would draw others at random.
    """
    name, _, text = value.partition(" ")
    arguments = _arguments(value, text.strip() or "{}")
    known: dict[str, Callable[[str], _Verifier]] = {}
    for module in _VERIFIERS:
        if name not in known:
            if module == _IFBENCH:
                log(f"{name}: not of IFEval. Loading IFBench, which first tries to download data.")
            known |= _verifiers(module)
    if name not in known:
        hint = did_you_mean(name, known) or f"Known: {', '.join(known)}."
        raise GattError(f"No instruction of IFEval or IFBench is named {name!r}. {hint}")
    verifier = known[name](name)
    expected = verifier.get_instruction_args_keys()
    wrong = [key for key in arguments if key not in expected]
    if wrong or len(arguments) < len(expected):
        raise GattError(
            f"The check ifeval = {name!r} has the arguments {', '.join(arguments) or 'none'}; "
            f"expected {', '.join(expected) or 'none'}."
        )
    try:
        verifier.build_description(**arguments)
    except Exception as error:
        raise GattError(
            f"The check ifeval = {name!r} does not accept {json.dumps(arguments)}: "
            f"{_described(error)}."
        ) from error
    used = verifier.get_instruction_args() or {}
    for key, argument in arguments.items():
        if _comparable(used.get(key, argument)) != _comparable(argument):
            raise GattError(
                f"The check ifeval = {name!r} does not accept {key} = {_json_text(argument)}: it "
                f"would use {_json_text(used[key])} in its place. A list is written in brackets, "
                "even of one item; a number is 1 or more."
            )
    # What is missing, or of another type than expected, is seen before any work.
    _called(f"ifeval = {value}", _TRIED, lambda: verifier.check_following(_TRIED))
    return verifier


def _comparable(argument: object) -> object:
    """Return an argument for a comparison; verifiers sort lists and change the case of letters."""
    if isinstance(argument, str):
        return argument.strip().lower()
    if isinstance(argument, list | tuple | set):
        return {str(_comparable(item)) for item in argument}
    return argument


def _json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _arguments(value: str, text: str) -> dict[str, object]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise GattError(
            f"The check ifeval = {value!r} has arguments that are not a table. Expected "
            '{ifeval = "keywords:existence", arguments = {keywords = ["sea"]}}.'
        )
    return arguments


def _verifiers(module: str) -> dict[str, Callable[[str], _Verifier]]:
    """Return the class of each instruction by its public name."""
    try:
        # IFBench looks for data of NLTK when it is imported, and says so where it cannot.
        with contextlib.redirect_stderr(io.StringIO()):
            known: dict[str, Callable[[str], _Verifier]] = importlib.import_module(
                module
            ).INSTRUCTION_DICT
        # Otherwise the language of a text is detected by chance.
        importlib.import_module("langdetect").DetectorFactory.seed = 0
    except ImportError as error:
        raise GattError(
            f"The verifiers of IFEval and IFBench are not installed ({error}). Install them with "
            "`pip install if-verifiable` (Python 3.11 or newer), or use other checks."
        ) from error
    return known
