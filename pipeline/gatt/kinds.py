"""The kinds of constraint: how each is worded, whether an answer obeys, and the edit that makes one obey.

One `Kind` for each. A check is exact about its own wording and never raises; an `apply` turns any text into one that
passes the check, or is None where obeying is no edit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import GattError
from pipeline.gatt.text import sentences, words
from pipeline.records import Constraint


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of constraint. `{v}` in a wording stands for the value. Two kinds of one `slot` never meet.

    `hopeless` says of the beginning of an answer that nothing that may follow can make it pass the check.
    """

    slot: str
    wordings: tuple[str, ...]
    short: str
    check: Callable[[str, str], bool]
    apply: Callable[[str, str], str] | None = None
    values: tuple[str, ...] = ("",)
    hopeless: Callable[[str, str], bool] = lambda value, text: False


def _opens(value: str, text: str) -> bool:
    return text.lstrip().startswith(value)


def _opens_otherwise(value: str, text: str) -> bool:
    begun = text.lstrip()
    return not value.startswith(begun) and not begun.startswith(value)


def _closes(value: str, text: str) -> bool:
    return text.rstrip().endswith(value)


def _count(value: str) -> int:
    return int(value)


def _first_words(value: str, text: str) -> str:
    """As many whole sentences as fit in the limit, else the first words."""
    kept: list[str] = []
    for sentence in sentences(text):
        if len(words(" ".join([*kept, sentence]))) > _count(value):
            break
        kept.append(sentence)
    return " ".join(kept) or " ".join(text.split()[: _count(value)]).rstrip(",;:") + "."


KINDS: dict[str, Kind] = {
    "opening": Kind(
        "opening",
        ('Begin every answer with "{v}"', 'Always start your replies with "{v}"', 'From now on, open each answer with "{v}"'),
        'Opening: "{v}"', _opens, lambda v, t: f"{v} {t.lstrip()}", ("Ahoy!", "Hark!", "Good news:", "Well, well!"),
        _opens_otherwise,
    ),
    "closing": Kind(
        "closing",
        ('End every answer with "{v}"', 'Always close your replies with "{v}"', 'From now on, finish each answer with "{v}"'),
        'Closing: "{v}"', _closes, lambda v, t: f"{t.rstrip()} {v}", ("Over and out.", "Stay curious!", "So it goes."),
    ),
    "persona": Kind(
        "opening",
        ('Act as {v} and begin every answer with "{v}:"', 'You are {v}. Start each reply with "{v}:"'),
        "Figure: {v}, named first.", lambda v, t: _opens(f"{v}:", t), lambda v, t: f"{v}: {t.lstrip()}",
        ("Captain Nemo", "Napoleon", "Ada Lovelace"), lambda v, t: _opens_otherwise(f"{v}:", t),
    ),
    "hobby": Kind(
        "content",
        ("You love {v}: mention {v} in every answer.", "Your hobby is {v}. Bring up {v} each time you reply."),
        "Hobby: {v}, always mentioned.",
        lambda v, t: v.lower() in t.lower(), None, ("tennis", "chess", "gardening"),
    ),
    "uppercase": Kind(
        "case", ("Write every answer in capital letters only.",), "Capitals only.",
        lambda v, t: t.isupper(), lambda v, t: t.upper(), hopeless=lambda v, t: any(map(str.islower, t)),
    ),
    "lowercase": Kind(
        "case", ("Write every answer in lowercase letters only.",), "Lowercase only.",
        lambda v, t: t.islower(), lambda v, t: t.lower(), hopeless=lambda v, t: any(map(str.isupper, t)),
    ),
    "max_words": Kind(
        "length", ("Use at most {v} words in every answer.",), "At most {v} words.",
        lambda v, t: 0 < len(words(t)) <= _count(v), _first_words, ("12", "20"),
        lambda v, t: len(words(t)) > _count(v),
    ),
    "quotes": Kind(
        "wrap", ("Put every answer in double quotation marks.",), "Answers in double quotes.",
        lambda v, t: len(t.strip()) > 2 and t.strip()[0] == '"' == t.strip()[-1],
        lambda v, t: '"' + t.strip().replace('"', "'") + '"', hopeless=lambda v, t: t.lstrip()[:1] not in ("", '"'),
    ),
    "question": Kind(
        "closing", ("End every answer with a question.",), "Ends with a question.", lambda v, t: _closes("?", t),
    ),
    "no_commas": Kind(
        "punctuation", ("Never use a comma in your answers.",), "No commas.",
        lambda v, t: bool(t.strip()) and "," not in t, lambda v, t: t.replace(",", ""), hopeless=lambda v, t: "," in t,
    ),
}  # fmt: skip

_INCOMPATIBLE = {frozenset(p) for p in (("wrap", "opening"), ("wrap", "closing"), ("case", "opening"), ("case", "closing"),
                                        ("length", "opening"), ("length", "closing"), ("case", "content"))}  # fmt: skip


def kind_of(constraint: Constraint) -> Kind:
    """The kind of a constraint.

    Raises:
        GattError: no such kind, or a kind that needs a value has none.
    """
    kind = KINDS.get(constraint.kind)
    if kind is None:
        raise GattError(f"Unknown kind of instruction {constraint.kind!r}. Known: {', '.join(KINDS)}.")
    if kind.values != ("",) and not constraint.value:
        raise GattError(f"An instruction of kind {constraint.kind!r} needs a value, for example {kind.values[0]!r}.")
    if constraint.kind == "max_words" and not re.fullmatch(r"[1-9]\d*", constraint.value):
        raise GattError(f"max_words wants a whole number such as '12', not {constraint.value!r}.")
    return kind


def compatible(one: Constraint, other: Constraint) -> bool:
    """Whether one answer can show both: different slots, and no pair of the table above."""
    slots = {kind_of(one).slot, kind_of(other).slot}
    return len(slots) == 2 and slots not in _INCOMPATIBLE


def obeys(constraints: tuple[Constraint, ...], text: str) -> bool:
    """Whether `text` shows every constraint."""
    return all(kind_of(c).check(c.value, text) for c in constraints)


def hopeless(constraints: tuple[Constraint, ...], text: str) -> bool:
    """Whether no answer that begins with `text` can show all of them: used to stop a candidate early."""
    return any(kind_of(c).hopeless(c.value, text) for c in constraints)


def editable(constraints: tuple[Constraint, ...]) -> bool:
    """Whether obeying all of them is an exact edit."""
    return all(kind_of(c).apply for c in constraints)


def edit(constraints: tuple[Constraint, ...], text: str) -> str:
    """`text` changed so that it obeys; only for constraints that are `editable`."""
    for constraint in constraints:
        apply = kind_of(constraint).apply
        if apply is None:
            raise ValueError(f"{constraint.kind} is no edit")
        text = apply(constraint.value, text)
    return text
