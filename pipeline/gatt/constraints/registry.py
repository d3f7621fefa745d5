"""What can be asked of an answer: which constraints go together, whether an answer obeys, and the edit that makes it.

The kinds themselves stand in the table of catalogue.py.
"""

from __future__ import annotations

import re

from pipeline.errors import GattError
from pipeline.gatt.constraints.base import Kind
from pipeline.gatt.constraints.catalogue import KINDS
from pipeline.records import Constraint

__all__ = ["KINDS", "Kind", "compatible", "edit", "editable", "kind_of", "obeys", "prefix_fails"]

INCOMPATIBLE_SLOTS: dict[str, tuple[str, ...]] = {
    "json": ("opening", "closing", "heading", "wrap", "layout", "case", "length", "punctuation", "ends", "bold", "emoji",
             "no_emoji", "address", "language", "digits", "forbidden"),
    "wrap": ("opening", "closing", "heading", "layout", "bold"),
    "layout": ("opening", "closing", "heading", "length"),
    "length": ("opening", "closing", "heading", "address"),
    "heading": ("opening", "ends"),
    "ends": ("closing",),
    "language": ("content", "address", "forbidden"),
}  # fmt: skip
"""Slots that one answer cannot show together, each pair named once; a slot never meets itself either.

Words that are demanded or forbidden are English, so they do not meet a language. Everything that an answer has around it
or in front of it would be left out of JSON, and would count as words. A code block shows no bold.
"""

EDIT_ORDER = (
    "punctuation", "no_emoji", "case", "length", "bold", "address", "opening", "layout", "ends", "emoji", "wrap", "heading",
    "closing",
)  # fmt: skip
"""The slots in the order in which edits are made, so that none undoes another: first what is taken out or changed, then
what is put in, last what stands around the whole. Slots that are not named have no edits, or meet none that have."""


def kind_of(constraint: Constraint) -> Kind:
    """The kind of a constraint.

    Raises:
        GattError: no such kind, or a value that the kind does not take.
    """
    name, value = constraint.kind, constraint.value
    kind = KINDS.get(name)
    if kind is None:
        raise GattError(f"Unknown kind of instruction {name!r}. Known: {', '.join(KINDS)}.")
    if kind.values == ("",):
        if value:
            raise GattError(
                f"An instruction of kind {name!r} takes no value, but has {value!r}. Leave it out."
            )
    elif not value.strip():
        raise GattError(
            f"An instruction of kind {name!r} needs a value, for example {kind.values[0]!r}."
        )
    elif kind.accepts == "number" and not re.fullmatch(r"[1-9][0-9]{0,3}", value):
        raise GattError(f"{name} wants a whole number such as {kind.values[0]!r}, not {value!r}.")
    elif kind.accepts == "listed" and value not in kind.values:
        raise GattError(f"{name} wants one of {', '.join(kind.values)}, not {value!r}.")
    return kind


def compatible(one: Constraint, other: Constraint) -> bool:
    """Whether one answer can show both: their slots may meet, and neither bans the phrase that the other puts in."""
    first, second = kind_of(one), kind_of(other)
    if (
        first.slot == second.slot
        or second.slot in INCOMPATIBLE_SLOTS.get(first.slot, ())
        or first.slot in INCOMPATIBLE_SLOTS.get(second.slot, ())
    ):
        return False
    said, said_too = (
        first.required_phrase.format(v=one.value),
        second.required_phrase.format(v=other.value),
    )
    return not first.forbids(one.value, said_too) and not second.forbids(other.value, said)


def obeys(constraints: tuple[Constraint, ...], text: str) -> bool:
    """Whether `text` shows every constraint."""
    return all(kind_of(c).check(c.value, text) for c in constraints)


def prefix_fails(constraints: tuple[Constraint, ...], text: str) -> bool:
    """Whether no answer that begins with `text` can show all of them: used to stop a candidate early."""
    return any(kind_of(c).prefix_fails(c.value, text) for c in constraints)


def editable(constraints: tuple[Constraint, ...]) -> bool:
    """Whether obeying all of them is an exact edit."""
    return all(kind_of(c).apply for c in constraints)


def edit(constraints: tuple[Constraint, ...], text: str) -> str:
    """`text` changed so that it obeys; only for constraints that are `editable` and `compatible`."""
    for constraint in sorted(constraints, key=_turn):
        apply = kind_of(constraint).apply
        if apply is None:
            raise ValueError(f"{constraint.kind} is no edit")
        text = apply(constraint.value, text)
    return text


def _turn(constraint: Constraint) -> int:
    return [*EDIT_ORDER, kind_of(constraint).slot].index(kind_of(constraint).slot)
