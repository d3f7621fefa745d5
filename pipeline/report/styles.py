"""The names, colors, markers and lines of the models in the figures of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Style(NamedTuple):
    """How the line of one arm is drawn: matplotlib's color, marker and line style."""

    color: str
    marker: str
    dashes: str


STYLES = {
    "base": Style("#d1602c", "o", "-"),
    "tuned": Style("#2a8fb4", "s", "-"),
    "ceiling": Style("#868b93", "", "--"),
}
"""The arms that every run has. Colors and markers differ in a grayscale print, too."""
_FURTHER_STYLES = (
    Style("#9467bd", "^", "-."),
    Style("#4d9a3b", "D", ":"),
    Style("#c0568f", "v", "-."),
    Style("#a08328", "P", ":"),
    Style("#2a8fb4", "s", "-"),
    Style("#b23b3b", "X", "--"),
    Style("#3f6fd1", "<", "-."),
    Style("#6b7d2a", ">", ":"),
)
_NAMES = {"tuned": "GAtt-tuned", "ceiling": "base, reminded every turn"}


def arm_label(arm: str) -> str:
    """Return the name of an arm as figures show it."""
    return _NAMES.get(arm, arm)


def styles_for(arms: Iterable[str]) -> dict[str, Style]:
    """Return the styles of base, tuned, ceiling and up to eight other arms, in the order given."""
    further = iter(_FURTHER_STYLES)
    styles = {arm: STYLES.get(arm) or next(further, None) for arm in dict.fromkeys(arms)}
    return {arm: style for arm, style in styles.items() if style}
