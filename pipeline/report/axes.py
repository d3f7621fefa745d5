"""Axes with a line for each model: limits, ticks, lines with intervals, and their names."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from pipeline.report.styles import Style, arm_label
from pipeline.report.svg import FONT_SIZE, Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICK_STEPS = (1, 5, 10, 20, 50, 100)
"""Turns between two labels of an axis."""
_MAX_TICKS = 10
_MAX_MARKERS = 30
"""Of a line; with more points, only some of them are marked."""


class LineLabel(NamedTuple):
    """The name of an arm at the end (x, y) of its line."""

    arm: str
    x: float
    y: float
    color: str


def single_axes(layout: Layout, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 0.95 * height) if layout == "narrow" else (7, height))
    return figure, figure.subplots()


class Estimate(Protocol):
    """A number with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def draw_rates(
    axes: Axes,
    turns: Sequence[float],
    rates: Sequence[Estimate],
    style: Style,
    *,
    faint: bool = False,
) -> None:
    """Draw a line with its interval as a band."""
    low, high = [rate.low for rate in rates], [rate.high for rate in rates]
    alpha = 0.07 if faint else 0.14
    axes.fill_between(turns, low, high, color=style.color, alpha=alpha, linewidth=0)
    draw_line(axes, turns, [rate.value for rate in rates], style, width=1.2 if faint else 1.8)


def draw_line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    style: Style,
    *,
    width: float = 1.8,
    drawstyle: Literal["default", "steps-post"] = "default",
) -> None:
    axes.plot(
        x,
        y,
        style.dashes,
        color=style.color,
        marker=style.marker,
        markersize=4,
        markevery=-(-len(x) // _MAX_MARKERS),
        linewidth=width,
        drawstyle=drawstyle,
        zorder=2 if style.dashes == "-" else 3,  # lines with gaps do not hide those below them
    )


def count_text(dialogues: Iterable[int]) -> str:
    """Return the number of dialogues of the arms, as "24 dialogues" or "24 to 48 dialogues"."""
    counts = sorted(set(dialogues))
    if counts == [1]:
        return "1 dialogue"
    return f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} dialogues"


def format_turns(axes: Axes, layout: Layout, turns: int, label: str) -> None:
    """Set limits, ticks and x label of axes with turns across and shares up."""
    axes.set(xlim=(0.5, 1.02 * turns), ylim=(-0.02, 1.04))  # ends before the labels of the lines
    axes.set_xlabel(wrapped(label, layout))
    axes.set_xticks(turn_ticks(turns))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def turn_ticks(turns: int) -> list[int]:
    """Return turns to label: round ones and the first, few enough to be read side by side."""
    steps = (step for step in _TICK_STEPS if turns <= step * _MAX_TICKS)
    step = next(steps, -(-turns // _MAX_TICKS))
    return sorted({1, *range(step, turns + 1, step)})


def wrapped(label: str, layout: Layout) -> str:
    return textwrap.fill(label, 36 if layout == "narrow" else 80)


def draw_labels(axes: Axes, layout: Layout, labels: Sequence[LineLabel]) -> None:
    """Write the name of each line right of its end, in up to two lines, moved apart if need be.

    All stand right of the longest line, so that none covers another line.
    """
    axes_inches = axes.bbox.height / axes.figure.dpi
    line_height = 1.5 * FONT_SIZE / 72 / axes_inches  # as a fraction of the axes
    axes.get_ylim()  # settles the limits, which the transformation does not request
    to_axes = axes.transData + axes.transAxes.inverted()
    right = max((label.x for label in labels), default=0)
    columns = 14 if layout == "narrow" else 26
    texts = [
        textwrap.wrap(arm_label(label.arm), columns, max_lines=2, placeholder="…")
        for label in labels
    ]
    heights = [len(lines) * line_height for lines in texts]
    order = sorted(range(len(labels)), key=lambda index: labels[index].y)
    centers: dict[int, float] = {}
    bottom = -1e9
    for index in order:  # up from the lowest: each above the one before
        label, half = labels[index], heights[index] / 2
        centers[index] = max(to_axes.transform((label.x, label.y))[1], bottom + half)
        bottom = centers[index] + half
    top = max(1.04, sum(heights))
    for index in reversed(order):  # and down from the top, where they would leave the axes
        centers[index] = min(centers[index], top - heights[index] / 2)
        top = centers[index] - heights[index] / 2
    for index, label in enumerate(labels):
        axes.annotate(
            "\n".join(texts[index]),
            (right, centers[index]),
            (10, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=label.color,
            va="center",
            annotation_clip=False,
            fontweight="bold",
            linespacing=1.0,
        )
