"""The parameters of the task, read as those of `gatt exam`, and how Inspect names what is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

from pipeline.errors import GattError
from pipeline.exam.arms import Arm, find_arms
from pipeline.exam.settings import ExamSettings, WindowPolicy, most_turns, parse_turns
from pipeline.exam.tasks import ExamTask, exam_tasks
from pipeline.records import MAX_THOUGHT_TOKENS, SAMPLERS, SamplerName

_WINDOWS: dict[str, WindowPolicy] = {name: name for name in get_args(WindowPolicy)}
_SAMPLERS: dict[str, SamplerName] = {name: name for name in SAMPLERS}
_MIN_TOKENS = 8
T = TypeVar("T", bound=Callable[..., Any])


def of_gatt(function: T) -> T:
    """Let Inspect call what `function` makes "gatt/...", wherever the package is installed.

    It would take the import package's name, or none for an editable installation.
    """
    function.__module__ = "gatt"
    return function


def words_of(value: str | Sequence[str]) -> list[str]:
    """Return the words of a parameter, which may be one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    return [part for text in parts if (part := str(text).strip())]


def arms_of(value: str | Sequence[str]) -> list[Arm]:
    """Return the arms of the parameter `arms`.

    Raises:
        GattError: no such arm, none at all, or one that needs more than an API.
    """
    names = words_of(value)
    if not names:
        raise GattError("-T arms= is empty. Take once, or several such as once,every.")
    arms = find_arms(names)
    for arm in arms:
        if arm.kind == "steer":
            raise GattError(
                f"-T arms={arm.name}: Inspect asks models through an API, and none has control "
                f"vectors. Leave it out, or run `gatt exam MODEL.gguf --arm {arm.name}`."
            )
    return arms


def tasks_of(regimes: str | Sequence[str], dialogues: int, turns: int) -> list[ExamTask]:
    """Return the dialogues that the parameters choose; `turns` 0 is until the context is full.

    Raises:
        GattError: no such regime, or a negative number.
    """
    if not isinstance(dialogues, int) or dialogues < 0:
        raise GattError(f"-T dialogues={dialogues}: expected the number of each regime, or 0: all.")
    return exam_tasks(words_of(regimes), dialogues, most_turns(turns, 0))


def turns_of(value: int | str) -> int:
    """Return the parameter `turns` as a number; 0 is until the context is full.

    Raises:
        GattError: neither a number from 2 on nor "context".
    """
    return parse_turns(str(value))


def settings_of(sampler: str, window: str, max_tokens: int, seed: int) -> ExamSettings:
    """Return the settings, as `gatt exam` has them for a server.

    Raises:
        GattError: no such sampler or window, or no number.
    """
    if sampler not in _SAMPLERS:
        raise GattError(f"-T sampler={sampler}: expected one of {', '.join(_SAMPLERS)}.")
    if window not in _WINDOWS:
        raise GattError(f"-T window={window}: expected one of {', '.join(_WINDOWS)}.")
    if not isinstance(max_tokens, int) or max_tokens < _MIN_TOKENS:
        raise GattError(f"-T max_tokens={max_tokens}: expected {_MIN_TOKENS} or more.")
    if not isinstance(seed, int):
        raise GattError(f"-T seed={seed}: expected a whole number.")
    return ExamSettings(
        max_tokens=max_tokens,
        max_thought_tokens=MAX_THOUGHT_TOKENS,
        context=0,
        window=_WINDOWS[window],
        sampler=_SAMPLERS[sampler],
        seed=seed,
        system_role=True,
    )
