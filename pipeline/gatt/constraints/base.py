"""What a kind of constraint is. The table of all kinds is in catalogue.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Check = Callable[[str, str], bool]
"""Of a value and a text, or a part of one."""
Edit = Callable[[str, str], str]


def never(value: str, text: str) -> bool:
    """For a kind of which it cannot be said."""
    return False


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of constraint. `{v}` in a wording stands for the value. Two kinds of one `slot` never meet; reports sum up by
    `family`.

    `apply` turns an answer into one that passes the check, or is None where obeying is no edit. `values` are examples, and
    `accepts` says which others may be given: any, whole numbers, or only those that are listed.

    `hopeless` says of the beginning of an answer that nothing that may follow can make it pass. `bans` says of a phrase that
    no answer with it in can pass; `says` is the phrase that an obedient answer has in it (see `compatible`). Where it is
    `judged`, the check passes any text, and only a judge can say more.
    """

    family: str
    slot: str
    wordings: tuple[str, ...]
    short: str
    check: Check
    apply: Edit | None = None
    values: tuple[str, ...] = ("",)
    accepts: Literal["any", "number", "listed"] = "any"
    prefix_fails: Check = never
    forbids: Check = never
    required_phrase: str = ""
    judged: bool = False
