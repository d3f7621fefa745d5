"""All kinds of constraint by name, and what can be asked of constraints.

This is the interface of the package: which constraints combine, whether an answer meets them,
and the edit that makes it meet them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress

from pipeline.errors import GattError
from pipeline.gatt.constraints.base import Kind
from pipeline.gatt.constraints.content_kinds import PHRASE_KINDS, WORD_KINDS
from pipeline.gatt.constraints.custom_kinds import CUSTOM_KINDS
from pipeline.gatt.constraints.format_kinds import LAYOUT_KINDS, LENGTH_KINDS
from pipeline.gatt.constraints.style_kinds import STYLE_KINDS
from pipeline.records import Constraint, Message

KINDS: dict[str, Kind] = PHRASE_KINDS | WORD_KINDS | STYLE_KINDS | LENGTH_KINDS | LAYOUT_KINDS
"""Every kind that has a wording, by its name, in the order of `gatt instructions --kinds`."""

INCOMPATIBLE_SLOTS: dict[str, tuple[str, ...]] = {
    "json": (
        *("opening", "closing", "heading", "wrap", "layout", "case", "length", "punctuation"),
        *("ends", "bold", "emoji", "no_emoji", "address", "language", "digits", "forbidden"),
    ),
    "wrap": ("opening", "closing", "heading", "layout", "bold"),
    "layout": ("opening", "closing", "heading", "length"),
    "length": ("opening", "closing", "heading", "address"),
    "heading": ("opening", "ends"),
    "ends": ("closing",),
    "language": ("content", "address", "forbidden"),
}
"""Slots that one answer cannot fill together, each pair listed once; no slot combines with itself.

Required and forbidden words are English, so they do not combine with a language. JSON leaves no
room for text around the object, and phrases would count as words of a limited length. A code
block does not render bold.
"""

EDIT_ORDER = (
    *("punctuation", "no_emoji", "case", "length", "bold", "address", "opening", "layout", "ends"),
    *("emoji", "wrap", "heading", "closing"),
)
"""Slots in the order of their edits, so that none undoes another.

First come removals and changes, then insertions, last what encloses the answer. Other slots have
no edits, or combine with none that has.
"""

_QUESTION: Message = {"role": "user", "content": "Why is the sea salty?"}
_PLAIN_ANSWERS = (
    "Rivers carry minerals from the rocks to the sea, where the water evaporates and they stay.",
    "It's mostly because of rivers! Rain dissolves a little rock, and the rivers bring it along. "
    "Over millions of years, that adds up.",
    "Yes, and here is why:\n\n1. Rain is slightly acidic.\n2. It dissolves **rocks**.\n3. Rivers "
    "carry the salt to the sea.\n\nWould you like to know more?",
    "I think so. Most of it is sodium chloride, about 35 grams in a liter.",
    "No.",
)
"""Answers to `_QUESTION` that follow no instruction."""


def kind_of(constraint: Constraint) -> Kind:
    """Return the kind of a constraint.

    Raises:
        GattError: no such kind, or a value that the kind does not accept.
    """
    name, value = constraint.kind, constraint.value
    kind = KINDS.get(name) or CUSTOM_KINDS.get(name)
    if kind is None:
        known = ", ".join((*KINDS, *CUSTOM_KINDS))
        raise GattError(f"Unknown kind of instruction {name!r}. Known: {known}.")
    if kind.values == ("",):
        if value:
            raise GattError(
                f"An instruction of kind {name!r} takes no value, but has {value!r}. Remove it."
            )
    elif not (value if kind.accepts == "pattern" else value.strip()):
        raise GattError(
            f"An instruction of kind {name!r} needs a value, for example {kind.values[0]!r}."
        )
    elif value != value.strip() and kind.accepts != "pattern":
        raise GattError(
            f"An instruction of kind {name!r} has a value with a space or line break at an end: "
            f"{value!r}. No answer could show it. Remove it."
        )
    elif kind.accepts == "number" and not re.fullmatch(r"[1-9][0-9]{0,3}", value):
        raise GattError(
            f"{name} expects a whole number such as {kind.values[0]!r}, but has {value!r}."
        )
    elif kind.accepts == "listed" and value not in kind.values:
        raise GattError(f"{name} expects one of {', '.join(kind.values)}, but has {value!r}.")
    return kind


def compatible(first: Constraint, second: Constraint) -> bool:
    """Return whether one answer can meet both constraints.

    Their slots have to combine, and neither may forbid the phrase that the other requires.
    """
    kind, second_kind = kind_of(first), kind_of(second)
    if (
        kind.slot == second_kind.slot
        or second_kind.slot in INCOMPATIBLE_SLOTS.get(kind.slot, ())
        or kind.slot in INCOMPATIBLE_SLOTS.get(second_kind.slot, ())
    ):
        return False
    phrase = kind.required_phrase.format(v=first.value)
    second_phrase = second_kind.required_phrase.format(v=second.value)
    return not (
        kind.forbids(first.value, second_phrase) or second_kind.forbids(second.value, phrase)
    )


def prepare(constraint: Constraint) -> None:
    """Make the check of a constraint ready.

    Raises:
        GattError: as `kind_of`, or its pattern, function or verifier cannot be used.
    """
    kind = kind_of(constraint)
    if kind.prepare:
        kind.prepare(constraint.value)


def obeys(constraints: tuple[Constraint, ...], text: str, dialogue: Sequence[Message] = ()) -> bool:
    """Return whether `text`, an answer to the last message of `dialogue`, meets all constraints.

    Raises:
        GattError: a function of the user has raised.
    """
    return all(_is_met(constraint, text, dialogue) for constraint in constraints)


def _is_met(constraint: Constraint, text: str, dialogue: Sequence[Message]) -> bool:
    kind = kind_of(constraint)
    if kind.dialogue_check:
        return kind.dialogue_check(constraint.value, text, dialogue)
    return kind.check(constraint.value, text)


def is_judged(constraints: Sequence[Constraint]) -> bool:
    """Return whether only a judge can tell if all constraints are met."""
    return any(kind_of(constraint).judged for constraint in constraints)


def required_words(constraints: Sequence[Constraint]) -> str:
    """Return the values of constraints that stand in an answer; they are no content of its own."""
    return " ".join(c.value for c in constraints if c.kind not in CUSTOM_KINDS)


def shows_obedience(constraint: Constraint) -> bool:
    """Return whether answers hardly ever meet the constraint unasked.

    Of a check of the user's own that is tried: no plain answer passes it. One that cannot be used
    on these, such as a function that raises, shows nothing.
    """
    kind = kind_of(constraint)
    if constraint.kind not in CUSTOM_KINDS or kind.judged:
        return not kind.often_met
    with suppress(GattError):
        return not any(_is_met(constraint, text, [_QUESTION]) for text in _PLAIN_ANSWERS)
    return False


def prefix_fails(constraints: tuple[Constraint, ...], prefix: str) -> bool:
    """Return whether no answer that begins with `prefix` can meet all constraints."""
    return any(kind_of(c).prefix_fails(c.value, prefix) for c in constraints)


def editable(constraints: tuple[Constraint, ...]) -> bool:
    """Return whether an exact edit can make any answer meet all constraints."""
    return all(kind_of(c).edit for c in constraints)


def edit(constraints: tuple[Constraint, ...], text: str) -> str:
    """Return `text`, edited to meet all constraints.

    Raises:
        ValueError: a constraint has no edit; ask `editable` first.
    """
    for constraint in sorted(constraints, key=_edit_position):
        kind = kind_of(constraint)
        if kind.edit is None:
            raise ValueError(f"{constraint.kind} has no edit")
        text = kind.edit(constraint.value, text)
    return text


def _edit_position(constraint: Constraint) -> int:
    slot = kind_of(constraint).slot
    return EDIT_ORDER.index(slot) if slot in EDIT_ORDER else len(EDIT_ORDER)
