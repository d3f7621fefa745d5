"""Draw the figures of a report from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.evaluation.rates import Rate, wilson
from pipeline.evaluation.scores import ChangeScores, FidelityRow, RateRow
from pipeline.evaluation.statistics import Survival
from pipeline.report.axes import (
    LineLabel,
    count_text,
    draw_labels,
    draw_line,
    draw_rates,
    format_turns,
    single_axes,
    turn_ticks,
    wrapped,
)
from pipeline.report.styles import STYLES, Style, arm_label, styles_for
from pipeline.report.svg import TEXT_COLOR, Layout, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from pipeline.evaluation.attention import AttentionMap


_PAPER_COLOR = "#5d6470"
_MAX_POINTS = 40
"""Turns that are points of their own in a line."""


@rendered("adherence", "Share of the answers that keep the instruction, by turn")
def adherence_curve(
    layout: Layout,
    rows: Sequence[RateRow],
    turns: int,
    *,
    baked: bool = False,
    given: str = "the instruction is given in turn 1",
) -> Figure:
    """Draw the adherence of each arm by turn, with its 95 % interval; `rows` are `by_turn`.

    Of long dialogues, the points are means of several turns. A `baked` prompt is given to the
    ceiling only; otherwise the axis says what is `given`.
    """
    by_arm: dict[str, list[RateRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    figure, axes = single_axes(layout, 4.2)
    labels = []
    size = 1 if turns <= _MAX_POINTS else -(-turns // (_MAX_POINTS // 2))
    for arm, style in styles_for(by_arm).items():
        points = mean_rates(by_arm[arm], size)
        draw_rates(axes, list(points), list(points.values()), style)
        turn, rate = list(points.items())[-1]
        labels.append(LineLabel(_name(arm, baked=baked), turn, rate.value, style.color))
    if not by_arm:
        axes.text(0.5, 0.5, "No instruction has a check.", ha="center", transform=axes.transAxes)
    dialogues = count_text(max(row.n for row in by_arm[arm]) for arm in by_arm)
    means = f"means of {size} turns; " if size > 1 else ""
    given = "the prompt is not given" if baked else given
    note = f"turn ({dialogues}; {means}{given})"
    format_turns(axes, layout, turns, note)
    axes.set_ylabel("answers that keep the instruction")
    draw_labels(axes, layout, labels)
    return figure


def _name(arm: str, *, baked: bool) -> str:
    """Return the name of an arm; that of a ceiling which is given a baked prompt says so."""
    return "base, with the prompt" if baked and arm == "ceiling" else arm


def mean_rates(rows: Sequence[RateRow], size: int) -> dict[float, Rate]:
    """Return the rates of `size` turns each by their mean turn, in order; `rows` are by turn.

    The interval is that of one turn with the same rate, as the answers of a dialogue are alike.
    """
    groups: dict[int, list[RateRow]] = {}
    for row in sorted(rows, key=lambda row: int(row.at)):
        groups.setdefault((int(row.at) - 1) // size, []).append(row)
    means = {}
    for group in groups.values():
        rate, n = sum(r.hits for r in group) / sum(r.n for r in group), max(r.n for r in group)
        middle = sum(int(row.at) for row in group) / len(group)
        means[middle] = replace(wilson(round(rate * n), n), value=rate)
    return means


@rendered("recall", "Share of the attributes of turn 1 that are recalled, by turn")
def recall_curve(
    layout: Layout,
    rows: Sequence[RateRow],
    paper: Mapping[str, Mapping[int, float]],
    arms: Sequence[str],
) -> Figure:
    """Draw what each arm recalls by turn, with its 95 % interval, and the lines of the paper.

    Turns are equally far apart. `paper` has shares by turn for each of its models. `arms` are those
    of the other figures: all keep their colors.
    """
    turns = sorted({int(row.at) for row in rows})
    figure, axes = single_axes(layout, 3.6)
    labels = []
    for name, shares in paper.items():
        x = [turns.index(turn) for turn in shares if turn in turns]
        y = [shares[turns[position]] for position in x]
        if x:
            draw_line(axes, x, y, Style(_PAPER_COLOR, "", ":"), width=1.4)
            labels.append(LineLabel(f"paper, {name}", x[-1], y[-1], _PAPER_COLOR))
    for arm, style in styles_for(arms).items():
        points = sorted((row for row in rows if row.arm == arm), key=lambda row: int(row.at))
        if points:
            x = [turns.index(int(row.at)) for row in points]
            draw_rates(axes, x, points, style)
            labels.append(LineLabel(arm, x[-1], points[-1].value, style.color))
    axes.set(xlim=(-0.15, len(turns) - 0.98 if len(turns) > 1 else 0.5), ylim=(-0.02, 1.04))
    axes.set_xticks(range(len(turns)), [str(turn) for turn in turns])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(wrapped("asked in turn (the attributes are in turn 1)", layout))
    axes.set_ylabel("recalled, of what is known")
    draw_labels(axes, layout, labels)
    return figure


@rendered("survival", "Share of the dialogues without a broken answer so far, by turn")
def survival_curve(
    layout: Layout, survival: Mapping[str, Survival], turns: int, *, baked: bool = False
) -> Figure:
    """Draw the share of dialogues without a broken answer so far, with its 95 % interval.

    A `baked` prompt is given to the ceiling only.
    """
    figure, axes = single_axes(layout, 3.4)
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
        draw_line(axes, x, values, style._replace(marker=""), drawstyle="steps-post")
        labels.append(LineLabel(_name(arm, baked=baked), x[-1], values[-1], style.color))
    dialogues = count_text(survival[arm].dialogues for arm in survival)
    format_turns(axes, layout, turns, f"turn ({dialogues})")
    axes.set_ylabel("dialogues not broken so far")
    draw_labels(axes, layout, labels)
    return figure


@rendered("cost", "Milliseconds per generated token, by turn")
def cost_curve(
    layout: Layout, costs: Mapping[str, Mapping[float, float]], turns: int, note: str
) -> Figure:
    """Draw what a generated token costs each arm, in milliseconds by turn."""
    figure, axes = single_axes(layout, 3.2)
    labels = []
    for arm, style in styles_for(costs).items():
        x, y = list(costs[arm]), list(costs[arm].values())
        if x:
            draw_line(axes, x, y, style)
            labels.append(LineLabel(arm, x[-1], y[-1], style.color))
    format_turns(axes, layout, turns, f"turn ({note})")
    highest = max(ms for points in costs.values() for ms in points.values())
    axes.set_ylim(0, 1.05 * highest or 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("ms per generated token")
    draw_labels(axes, layout, labels)
    return figure


@rendered("change", "Share of the answers that keep the old and the new instruction, by turn")
def change_curve(
    layout: Layout, change: Mapping[str, ChangeScores], arms: Sequence[str] = ()
) -> Figure:
    """Draw each arm's adherence to the old instruction and, from the change on, to the new one.

    `arms` are those of the other figures, some of which are not measured here: all keep their
    colors.
    """
    figure, axes = single_axes(layout, 3.2)
    labels = []
    for arm, style in styles_for([*arms, *change]).items():
        if arm not in change:
            continue
        rows = change[arm].by_turn
        old = [wilson(round(row.old * row.n), row.n) for row in rows]
        draw_rates(axes, [row.turn for row in rows], old, Style(style.color, "", "--"), faint=True)
        changed = [row for row in rows if row.turn >= change[arm].change_turn] or rows
        new = [wilson(round(row.new * row.n), row.n) for row in changed]
        draw_rates(axes, [row.turn for row in changed], new, style._replace(dashes="-"))
        labels.append(LineLabel(arm, rows[-1].turn, rows[-1].new, style.color))
    change_turn = max(scores.change_turn for scores in change.values())
    axes.axvline(change_turn - 0.5, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    turns = max(scores.by_turn[-1].turn for scores in change.values())
    dialogues = count_text(scores.dialogues for scores in change.values())
    note = "new instruction from the dotted line on; dashed: old"
    format_turns(axes, layout, turns, f"turn ({dialogues}; {note})")
    axes.set_ylabel("answers that keep it")
    draw_labels(axes, layout, labels)
    return figure


@rendered("fidelity", "Reminder fidelity, by turn")
def fidelity_curve(layout: Layout, rows: Sequence[FidelityRow]) -> Figure:
    """Draw the reminder fidelity of each arm by turn, with its 95 % interval, from -100 % up.

    The dotted line is the base that is told once, or that has no baked prompt.
    """
    by_arm: dict[str, list[FidelityRow]] = {}
    for row in rows:
        if not math.isnan(row.value):
            by_arm.setdefault(row.arm, []).append(row)
    figure, axes = single_axes(layout, 3.2)
    labels = []
    for arm, style in styles_for(by_arm).items():
        points = sorted(by_arm[arm], key=lambda row: int(row.at))
        draw_rates(axes, [int(row.at) for row in points], points, style)
        end = max(-1.0, points[-1].value)
        labels.append(LineLabel(arm, int(points[-1].at), end, style.color))
    axes.axhline(0, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    dialogues = count_text(max(row.dialogues for row in by_arm[arm]) for arm in by_arm)
    turns = max((int(row.at) for row in rows), default=1)
    format_turns(axes, layout, turns, f"turn ({dialogues}; dotted: the base)")
    lowest = min((low for row in rows for low in (row.value, row.low) if low < 0), default=0.0)
    axes.set_ylim(max(-1.0, lowest) - 0.02, 1.04)
    axes.set_ylabel("reminder fidelity")
    draw_labels(axes, layout, labels)
    return figure


@rendered("loss", "Loss by training step")
def loss_curve(layout: Layout, losses: Sequence[float]) -> Figure:
    """Draw the loss of every training step."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = single_axes(layout, 2.8)
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
        draw_line(share_axes, list(range(1, len(shares) + 1)), shares, style)
        labels.append(LineLabel(arm, len(shares), shares[-1], style.color))
    share_axes.set(title="attention on the instruction", xlabel="turn")
    if min(share for attention in maps.values() for share in attention.share) > 0:
        share_axes.set_yscale("log")
    share_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    share_axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.2g}%")
    share_axes.yaxis.set_minor_formatter(lambda value, _: "")
    draw_labels(share_axes, layout, labels)
    return figure


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
    labeled = turn_ticks(max(turns))
    first_rows = [turns.index(turn) for turn in sorted(set(turns)) if turn in labeled]
    axes.set_yticks(first_rows, [f"turn {turns[row]}" for row in first_rows])
    axes.set_xticks([])
    axes.set_xlabel("the dialogue so far (▾ the instruction)")


def _shades(color: str) -> Colormap:
    """Return the shades from transparent to `color`, which work on any background."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("shades", [to_rgba(color, 0), to_rgba(color, 1)])
