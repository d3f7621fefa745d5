"""Draw the figures of a report from its numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.evaluation.rates import Rate, wilson
from pipeline.evaluation.scores import ChangeScores, RateRow
from pipeline.evaluation.statistics import Survival
from pipeline.report.styles import STYLES, Style, arm_label, styles_for
from pipeline.report.svg import FONT_SIZE, TEXT_COLOR, Layout, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from pipeline.evaluation.attention import AttentionMap


class _Label(NamedTuple):
    """The name of an arm at the end (x, y) of its line."""

    arm: str
    x: float
    y: float
    color: str


_LABELED_TURNS = (1, 5, 10, 15, 20)


@rendered("adherence", "Share of the answers that keep the instruction, by turn")
def adherence_curve(layout: Layout, rows: Sequence[RateRow], turns: int) -> Figure:
    """Draw the adherence of each arm by turn, with its 95 % interval; `rows` are `by_turn`."""
    by_arm: dict[str, list[RateRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    figure, axes = _single_axes(layout, 4.2)
    labels = []
    for arm, style in styles_for(by_arm).items():
        points = sorted(by_arm[arm], key=lambda row: int(row.at))
        _draw_rates(axes, [int(row.at) for row in points], points, style)
        labels.append(_Label(arm, int(points[-1].at), points[-1].value, style.color))
    if not by_arm:
        axes.text(0.5, 0.5, "No instruction has a check.", ha="center", transform=axes.transAxes)
    dialogues = _count_text(max(row.n for row in by_arm[arm]) for arm in by_arm)
    _format_turns(axes, layout, turns, f"turn ({dialogues}; the instruction is given in turn 1)")
    axes.set_ylabel("answers that keep the instruction")
    _draw_labels(axes, layout, labels)
    return figure


@rendered("survival", "Share of the dialogues without a broken answer so far, by turn")
def survival_curve(layout: Layout, survival: Mapping[str, Survival], turns: int) -> Figure:
    """Draw the share of dialogues without a broken answer so far, with its 95 % interval."""
    figure, axes = _single_axes(layout, 3.4)
    labels = []
    for arm, style in styles_for(survival).items():
        steps = survival[arm].steps
        if not steps:
            continue
        x = [0.5, *(step.turn for step in steps)]
        values = [1.0, *(step.value for step in steps)]
        low, high = [1.0, *(step.low for step in steps)], [1.0, *(step.high for step in steps)]
        axes.fill_between(x, low, high, step="post", color=style.color, alpha=0.14, linewidth=0)
        if values[-1] == 0:  # all dialogues are broken and remain so
            x, values = [*x, max(turns, x[-1])], [*values, 0.0]
        _draw_line(axes, x, values, style._replace(marker=""), drawstyle="steps-post")
        labels.append(_Label(arm, x[-1], values[-1], style.color))
    dialogues = _count_text(survival[arm].dialogues for arm in survival)
    _format_turns(axes, layout, turns, f"turn ({dialogues})")
    axes.set_ylabel("dialogues not broken so far")
    _draw_labels(axes, layout, labels)
    return figure


@rendered("change", "Share of the answers that keep the old and the new instruction, by turn")
def change_curve(
    layout: Layout, change: Mapping[str, ChangeScores], arms: Sequence[str] = ()
) -> Figure:
    """Draw each arm's adherence to the old instruction and, from the change on, to the new one.

    `arms` are those of the other figures, some of which are not measured here: all keep their
    colors.
    """
    figure, axes = _single_axes(layout, 3.2)
    labels = []
    for arm, style in styles_for([*arms, *change]).items():
        if arm not in change:
            continue
        rows = change[arm].by_turn
        old = [wilson(round(row.old * row.n), row.n) for row in rows]
        _draw_rates(axes, [row.turn for row in rows], old, Style(style.color, "", "--"), faint=True)
        changed = [row for row in rows if row.turn >= change[arm].change_turn] or rows
        new = [wilson(round(row.new * row.n), row.n) for row in changed]
        _draw_rates(axes, [row.turn for row in changed], new, style._replace(dashes="-"))
        labels.append(_Label(arm, rows[-1].turn, rows[-1].new, style.color))
    change_turn = max(scores.change_turn for scores in change.values())
    axes.axvline(change_turn - 0.5, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    turns = max(scores.by_turn[-1].turn for scores in change.values())
    dialogues = _count_text(scores.dialogues for scores in change.values())
    note = "new instruction from the dotted line on; dashed: old"
    _format_turns(axes, layout, turns, f"turn ({dialogues}; {note})")
    axes.set_ylabel("answers that keep it")
    _draw_labels(axes, layout, labels)
    return figure


@rendered("loss", "Loss by training step")
def loss_curve(layout: Layout, losses: Sequence[float]) -> Figure:
    """Draw the loss of every training step."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _single_axes(layout, 2.8)
    axes.plot(range(1, len(losses) + 1), losses, color=STYLES["tuned"].color, linewidth=1.4)
    axes.set(xlim=(0.5, len(losses) + 0.5), ylim=(0, None))
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@rendered(
    "attention", "Strongest attention of base and tuned model, and the share on the instruction"
)
def attention_figure(layout: Layout, maps: Mapping[str, AttentionMap]) -> Figure:
    """Draw what the answers of base and tuned attend to, and the instruction's share by turn."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.9, 10) if layout == "narrow" else (11.6, 3.9), layout="constrained")
    *map_axes, share_axes = (
        figure.subplots(3, 1)
        if layout == "narrow"
        else figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    )
    labels = []
    for arm, axes in zip(("base", "tuned"), map_axes, strict=True):
        style, shares = STYLES[arm], maps[arm].share
        _draw_map(axes, maps[arm], style.color)
        axes.set_title(arm_label(arm))
        _draw_line(share_axes, list(range(1, len(shares) + 1)), shares, style)
        labels.append(_Label(arm, len(shares), shares[-1], style.color))
    share_axes.set(title="attention on the instruction", xlabel="turn")
    if min(share for attention in maps.values() for share in attention.share) > 0:
        share_axes.set_yscale("log")
    share_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    share_axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.2g}%")
    share_axes.yaxis.set_minor_formatter(lambda value, _: "")
    _draw_labels(share_axes, layout, labels)
    return figure


def _single_axes(layout: Layout, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 0.95 * height) if layout == "narrow" else (7, height))
    return figure, figure.subplots()


def _draw_rates(
    axes: Axes, turns: Sequence[int], rates: Sequence[Rate], style: Style, *, faint: bool = False
) -> None:
    """Draw a line with its interval as a band."""
    low, high = [rate.low for rate in rates], [rate.high for rate in rates]
    alpha = 0.07 if faint else 0.14
    axes.fill_between(turns, low, high, color=style.color, alpha=alpha, linewidth=0)
    _draw_line(axes, turns, [rate.value for rate in rates], style, width=1.2 if faint else 1.8)


def _draw_line(
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
        linewidth=width,
        drawstyle=drawstyle,
        zorder=2 if style.dashes == "-" else 3,  # lines with gaps do not hide those below them
    )


def _draw_map(axes: Axes, attention: AttentionMap, color: str) -> None:
    """Draw the strongest attention of each answer (down) to the dialogue so far (across)."""
    axes.imshow(
        attention.strongest,
        aspect="auto",
        cmap=_shades(color),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.spines[["top", "right"]].set_visible(True)
    axes.plot(
        [sum(attention.instruction) / 2],
        [1.025],
        "v",
        color=TEXT_COLOR,
        markersize=6,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    turns = attention.turns
    first_rows = [turns.index(turn) for turn in sorted(set(turns)) if turn in _LABELED_TURNS]
    axes.set_yticks(first_rows, [f"turn {turns[row]}" for row in first_rows])
    axes.set_xticks([])
    axes.set_xlabel("the dialogue so far (▾ the instruction)")


def _shades(color: str) -> Colormap:
    """Return the shades from transparent to `color`, which work on any background."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("shades", [to_rgba(color, 0), to_rgba(color, 1)])


def _count_text(dialogues: Iterable[int]) -> str:
    """Return the number of dialogues of the arms, as "24 dialogues" or "24 to 48 dialogues"."""
    counts = sorted(set(dialogues))
    if counts == [1]:
        return "1 dialogue"
    return f"{' to '.join(map(str, counts[:1] + counts[1:][-1:]))} dialogues"


def _format_turns(axes: Axes, layout: Layout, turns: int, label: str) -> None:
    """Set limits, ticks and x label of axes with turns across and shares up."""
    axes.set(xlim=(0.5, 1.02 * turns), ylim=(-0.02, 1.04))  # ends before the labels of the lines
    axes.set_xlabel(textwrap.fill(label, 36 if layout == "narrow" else 80))
    axes.set_xticks([1, *range(5, turns + 1, 5)] if turns > 10 else range(1, turns + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_labels(axes: Axes, layout: Layout, labels: Sequence[_Label]) -> None:
    """Write the name of each line at its end, in up to two lines, moved apart to stay readable."""
    axes_inches = axes.bbox.height / axes.figure.dpi
    line_height = 1.5 * FONT_SIZE / 72 / axes_inches  # as a fraction of the axes
    axes.get_ylim()  # settles the limits, which the transformation does not request
    to_axes = axes.transData + axes.transAxes.inverted()
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
            (label.x, centers[index]),
            (10, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=label.color,
            va="center",
            annotation_clip=False,
            fontweight="bold",
            linespacing=1.0,
        )
