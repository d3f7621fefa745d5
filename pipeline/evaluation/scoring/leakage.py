"""What was trained and shows where no instruction was given, compared with the base model.

Many answers obey an instruction unasked ("at most 20 words"), so the base is the measure, in the
same dialogues. Two figures: how often an arm shows a trait that the base never shows there, and by
trait how much more often than the base. A model like the base may show by chance what the base did
not; the interval of the difference tells.

A trait is a trained constraint, or the form of a trained kind with any value: a model that has
learned to sign its answers may sign with a name that no training dialogue had.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from pipeline.evaluation.rates import Rate, rates, wilson
from pipeline.evaluation.scores import Leakage, RateRow, TraitRow
from pipeline.evaluation.statistics import paired_bootstrap
from pipeline.gatt.constraints.registry import is_judged, obeys
from pipeline.records import Constraint, Reply

_ByArm = Mapping[str, Sequence[Reply]]
_VALUES = {
    "persona": re.compile(r"\A([A-Z][^\s:]*(?: [A-Z][^\s:]*){0,3}):"),
    "signature": re.compile(r"\n- (.+)\Z"),
    "hashtag": re.compile(r"#(\w+)\Z"),
    "heading": re.compile(r"\A# (.+)"),
    "json": re.compile(r'\A\s*\{\s*"([^"]+)"'),
}
"""What stands in an answer in place of the value, in kinds whose answers have a form."""


class _Trait(NamedTuple):
    """A trained constraint; the form of its kind with any value if it has no value."""

    constraint: Constraint
    is_form: bool = False

    @property
    def name(self) -> str:
        return f"{self.constraint.kind}: any value" if self.is_form else self.constraint.name

    def shows_in(self, text: str) -> bool:
        if not self.is_form:
            return obeys((self.constraint,), text)
        match = _VALUES[self.constraint.kind].search(text.strip())
        value = match[1].strip() if match else ""  # no constraint has a value with a space around
        return bool(value) and obeys((replace(self.constraint, value=value),), text)


def measure_leakage(replies: Sequence[Reply], trained: Sequence[Constraint]) -> Leakage | None:
    """Return how often the `replies` to plain dialogues show what was trained.

    None where the base was not measured, or nothing was trained that a program can check.
    """
    by_arm = {
        arm: [r for r in replies if r.arm == arm and r.finish != "context"]
        for arm in dict.fromkeys(r.arm for r in replies)
    }
    # A function needs the dialogue that it was written for.
    checked = [c for c in dict.fromkeys(trained) if not (is_judged((c,)) or c.kind == "function")]
    forms = {c.kind: _Trait(replace(c, value=""), is_form=True) for c in checked}
    traits = [*map(_Trait, checked), *(form for kind, form in forms.items() if kind in _VALUES)]
    if not (traits and by_arm.get("base")):
        return None
    never, rows = [], []
    for trait in traits:
        shows = {arm: _showing(trait, of_arm) for arm, of_arm in by_arm.items()}
        if not any(r.obeys for r in shows["base"]):
            never.append(trait)
        rows += _differences(trait.name, shows)
    new = rates(replies, lambda r: r.arm, lambda r: any(t.shows_in(r.text) for t in never))
    return Leakage(
        traits=len(traits),
        never_in_base=len(never),
        new=tuple(_row(arm, "plain dialogues", rate) for arm, rate in new.items() if never),
        by_trait=tuple(rows),
    )


def _showing(trait: _Trait, replies: Sequence[Reply]) -> list[Reply]:
    """Return the replies marked as obeying where they show the trait, whatever was asked for."""
    return [replace(r, obeys=trait.shows_in(r.text), defect="") for r in replies]


def _differences(trait: str, shows: _ByArm) -> list[TraitRow]:
    """Return a row for each arm; none if every arm shows the trait as often as the base."""
    by_arm = {
        arm: wilson(sum(r.adherent for r in of_arm), len(of_arm))
        for arm, of_arm in shows.items()
        if of_arm
    }
    if len({rate.value for rate in by_arm.values()}) == 1:
        return []
    return [
        TraitRow(
            arm=arm,
            at=trait,
            **asdict(rate),
            difference=paired_bootstrap(shows["base"], shows[arm]),
        )
        for arm, rate in by_arm.items()
    ]


def _row(arm: str, at: str, rate: Rate) -> RateRow:
    return RateRow(arm=arm, at=at, **asdict(rate))
