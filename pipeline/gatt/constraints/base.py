"""The fields of a kind of constraint; the tables of all kinds are in the `*_kinds` modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.records import Message

Check = Callable[[str, str], bool]
"""A predicate of a value and a text (or the beginning of one). It never raises."""
Edit = Callable[[str, str], str]
"""A function of a value and an answer that returns an answer which passes the check."""


def never(value: str, text: str) -> bool:
    """Return False: the default where nothing can be told."""
    return False


def avoids(is_forbidden: Check) -> Check:
    """Return the check that a text is not blank and that `is_forbidden` is false of it."""

    def check(value: str, text: str) -> bool:
        return bool(text.strip()) and not is_forbidden(value, text)

    return check


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of constraint, such as "opening": how it is worded, checked and edited.

    `{v}` in a wording stands for the value; without wordings it is a check of instructions in the
    user's own words only. Kinds of one `slot` cannot be combined. Reports
    aggregate by `family`. `values` are examples; `accepts` says which other values are valid.
    """

    family: str
    slot: str
    wordings: tuple[str, ...]
    short: str
    values: tuple[str, ...] = ("",)
    accepts: Literal["any", "number", "listed", "pattern"] = "any"
    check: Check
    dialogue_check: Callable[[str, str, Sequence[Message]], bool] | None = None
    """Decides in place of `check`, with the messages before the answer as a third argument."""
    prepare: Callable[[str], object] | None = None
    """Raises a GattError if the check cannot be made with a value."""
    edit: Edit | None = None
    """Changes an answer so that it passes `check`; None where no exact edit can."""
    prefix_fails: Check = never
    """True only if no continuation of the given beginning can pass `check`; aborts sampling."""
    forbids: Check = never
    """True only if no answer that contains the given phrase can pass `check`."""
    required_phrase: str = ""
    """A phrase that every answer contains which passes `check` ("{v}" is the value)."""
    often_met: bool = False
    """Many answers pass `check` unasked, so that passing it tells little."""
    judged: bool = False
    """`check` accepts any text; only a judge can tell whether the constraint is met."""
