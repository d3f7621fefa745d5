"""Pictures: numbers in, SVG and PNG out. Text and axes are drawn in one color, which a page replaces by its own.

Each is drawn twice, for a desk and for a phone, whose text would be too small in a picture that was shrunk.
"""

from __future__ import annotations

import functools
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

from pipeline.evaluation.rates import wilson

Rows = list[dict[str, Any]]
P = ParamSpec("P")

_TEXT = "#1b1e23"
_STYLES = {
    "base": ("#d1602c", "o", "-"),
    "tuned": ("#2a8fb4", "s", "-"),
    "ceiling": ("#868b93", "", "--"),
}
_OTHERS = (
    ("#9467bd", "^", "-."),
    ("#4d9a3b", "D", ":"),
    ("#c0568f", "v", "-."),
    ("#a08328", "P", ":"),
    ("#2a8fb4", "s", "-"),
    ("#b23b3b", "X", "--"),
    ("#3f6fd1", "<", "-."),
    ("#6b7d2a", ">", ":"),
)
_NAMES = {"tuned": "GAtt-tuned", "ceiling": "base, told every turn"}
_TICKS = (1, 5, 10, 15, 20)


class Picture(NamedTuple):
    """A figure as SVG on no ground, wide and narrow, and as PNG (150 dpi) on white. `title` says what it shows."""

    svg: str
    narrow: str
    png: bytes
    title: str

    @property
    def inline(self) -> str:
        """The SVGs for a page, which shows one of them: their text takes the color of the page's."""
        return f'<span class="desk">{self._for_page(self.svg)}</span><span class="phone">{self._for_page(self.narrow)}</span>'

    def _for_page(self, svg: str) -> str:
        # Without matplotlib's names of groups (figure_1, axes_1), of which a page may have one each.
        plain = re.sub(r' id="[\w.]+_\d+"', "", svg).replace(_TEXT, "currentColor")
        return plain.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)

    @property
    def alone(self) -> str:
        """The SVG as a file of its own: on white, whatever shows it."""
        return self.svg.replace(">", '>\n <rect width="100%" height="100%" fill="#fff"/>', 1)


def _drawn(title: str) -> Callable[[Callable[Concatenate[bool, P], Any]], Callable[P, Picture]]:
    """Of a function that draws a figure, narrow or not, the one that gives the picture."""

    def of(draw: Callable[Concatenate[bool, P], Any]) -> Callable[P, Picture]:
        @functools.wraps(draw)
        def picture(*numbers: P.args, **named: P.kwargs) -> Picture:
            wide, narrow = (
                _rendered(draw(thin, *numbers, **named), title, thin) for thin in (False, True)
            )
            return Picture(wide[0], narrow[0], wide[1], title)

        return picture

    return of


@_drawn("Share of the answers that keep the instruction, by turn")
def adherence_curve(narrow: bool, rows: Rows, turns: int) -> Any:
    """Adherence by turn for each arm, with its 95 % interval. `rows` is `by_turn` of the scores."""
    figure, axes = _figure(narrow, 4.2)
    ends = []
    for arm, style in _styled([r["arm"] for r in rows]).items():
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["at"])
        at = [r["at"] for r in mine]
        _band(axes, at, [r["low"] for r in mine], [r["high"] for r in mine], style)
        _line(axes, at, [r["value"] for r in mine], style)
        ends.append((arm, at[-1], mine[-1]["value"], style[0]))
    _by_turn(
        axes,
        turns,
        "turn (the instruction is given in turn 1)",
        "answers that keep the instruction",
    )
    _labels(axes, ends)
    return figure


@_drawn("Share of the dialogues without a broken answer so far, by turn")
def survival_curve(narrow: bool, survival: dict[str, Any], turns: int) -> Any:
    """The share of dialogues without a broken answer so far, for each arm, with its 95 % interval."""
    figure, axes = _figure(narrow, 3.4)
    ends = []
    for arm, style in _styled(survival).items():
        steps = survival[arm]["steps"]
        if not steps:
            continue
        at, value, low, high = ([s[key] for s in steps] for key in ("turn", "value", "low", "high"))
        axes.fill_between(
            [0.5, *at], [1, *low], [1, *high], step="post", color=style[0], alpha=0.14, linewidth=0
        )
        if not value[-1]:  # all are broken, and remain so
            at, value = [*at, max(turns, at[-1])], [*value, 0.0]
        axes.step([0.5, *at], [1, *value], style[2], where="post", color=style[0], linewidth=1.8)
        ends.append((arm, at[-1], value[-1], style[0]))
    _by_turn(axes, turns, "turn", "dialogues not broken so far")
    _labels(axes, ends)
    return figure


@_drawn("Share of the answers that keep the old and the new instruction, by turn")
def change_curve(narrow: bool, change: dict[str, Any], arms: Sequence[str] = ()) -> Any:
    """Adherence of each arm to the old instruction (dashed) and, from the change on, to the new one, with 95 % intervals.

    `arms` of the other curves, some of which are not here: each keeps its color.
    """
    figure, axes = _figure(narrow, 3.2)
    ends = []
    turns = 1
    for arm, (color, marker, _) in _styled([*arms, *change]).items():
        if arm not in change:
            continue
        rows = change[arm]["by_turn"]
        turns = max(turns, rows[-1]["at"])
        new = [r for r in rows if r["at"] >= change[arm]["at"]] or rows
        for share, mine, style in (
            ("old", rows, (color, "", "--")),
            ("new", new, (color, marker, "-")),
        ):
            at, rates = (
                [r["at"] for r in mine],
                [wilson(round(r[share] * r["n"]), r["n"]) for r in mine],
            )
            _band(
                axes,
                at,
                [r.low for r in rates],
                [r.high for r in rates],
                style,
                0.14 if share == "new" else 0.07,
            )
            _line(axes, at, [r[share] for r in mine], style, 1.8 if share == "new" else 1.2)
        ends.append((arm, rows[-1]["at"], rows[-1]["new"], color))
    axes.axvline(
        max(found["at"] for found in change.values()) - 0.5,
        color=_TEXT,
        linewidth=0.8,
        linestyle=":",
    )
    _by_turn(
        axes,
        turns,
        "turn (the instruction changes at the dotted line; dashed: the old one)",
        "answers that keep it",
    )
    _labels(axes, ends)
    return figure


@_drawn("Loss by training step")
def loss_curve(narrow: bool, losses: Sequence[float]) -> Any:
    """The loss of every training step."""
    figure, axes = _figure(narrow, 2.8)
    axes.plot(range(1, len(losses) + 1), losses, color=_STYLES["tuned"][0], linewidth=1.4)
    axes.set(
        xlim=(0.5, len(losses) + 0.5), ylim=(0, None), xlabel="step", ylabel="loss, nats a token"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


@_drawn("Strongest attention of base and tuned model, and the share on the instruction by turn")
def attention_picture(narrow: bool, maps: dict[str, Any]) -> Any:
    """What answers attend to, base beside tuned, and the share that falls on the instruction by turn.

    `maps`: for each arm `strongest` (rows of answers, columns of the dialogue so far), `turns`, `instruction` and `share`.
    """
    size: dict[str, Any] = (
        {"figsize": (3.9, 10)} if narrow else {"figsize": (11.6, 3.9), "width_ratios": (1, 1, 1.1)}
    )
    figure, (*both, share) = _pyplot().subplots(
        *((3, 1) if narrow else (1, 3)), layout="constrained", **size
    )
    ends = []
    for (arm, found), axes in zip(
        ((arm, maps[arm]) for arm in ("base", "tuned")), both, strict=True
    ):
        color, marker, _ = _STYLES[arm]
        axes.imshow(
            found["strongest"],
            aspect="auto",
            cmap=_shades(color),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        middle = sum(found["instruction"]) / 2
        axes.plot(
            [middle],
            [1.025],
            "v",
            color=_TEXT,
            markersize=6,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
        turns = found["turns"]
        firsts = [turns.index(turn) for turn in sorted(set(turns)) if turn in _TICKS]
        axes.set_yticks(firsts, [f"turn {turns[row]}" for row in firsts])
        axes.set(title=_NAMES.get(arm, arm), xlabel="the dialogue so far (▾ the instruction)")
        axes.set_xticks([])
        _line(share, list(range(1, len(found["share"]) + 1)), found["share"], (color, marker, "-"))
        ends.append((arm, len(found["share"]), found["share"][-1], color))
    share.set(title="attention on the instruction", xlabel="turn")
    if min(value for found in maps.values() for value in found["share"]) > 0:
        share.set_yscale("log")
    share.xaxis.get_major_locator().set_params(integer=True)
    share.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.2g}%")
    share.yaxis.set_minor_formatter(lambda value, _: "")
    _labels(share, ends)
    share.spines[["top", "right"]].set_visible(False)
    return figure


def _styled(arms: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Color, marker and dashes for base, tuned, ceiling and up to eight other arms, in the order that they come in."""
    others = iter(_OTHERS)
    found = {}
    for arm in dict.fromkeys(arms):
        style = _STYLES.get(arm) or next(others, None)
        if style:
            found[arm] = style
    return found


def _shades(color: str) -> Any:
    """From nothing at all to the color: reads on any ground."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("shades", [to_rgba(color, 0), to_rgba(color, 1)])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 12.5,
            "text.color": _TEXT,
            "axes.edgecolor": _TEXT,
            "axes.labelcolor": _TEXT,
            "xtick.color": _TEXT,
            "ytick.color": _TEXT,
        }
    )
    return pyplot


def _figure(narrow: bool, height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(3.9, 0.95 * height) if narrow else (7, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _is_narrow(axes: Any) -> bool:
    return bool(axes.figure.get_size_inches()[0] < 5)


def _line(
    axes: Any,
    at: Sequence[float],
    values: Sequence[float],
    style: tuple[str, str, str],
    width: float = 1.8,
) -> None:
    color, marker, dashes = style
    axes.plot(at, values, dashes, color=color, marker=marker, markersize=4, linewidth=width)


def _band(
    axes: Any,
    at: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    style: tuple[str, str, str],
    alpha: float = 0.14,
) -> None:
    axes.fill_between(at, low, high, color=style[0], alpha=alpha, linewidth=0)


def _by_turn(axes: Any, turns: int, along: str, up: str) -> None:
    axes.set(
        xlim=(0.5, turns + 0.5),
        ylim=(-0.02, 1.04),
        xlabel=textwrap.fill(along, 36 if _is_narrow(axes) else 80),
        ylabel=up,
    )
    axes.set_xticks([1, *range(5, turns + 1, 5)] if turns > 10 else range(1, turns + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _labels(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """The name of each line at its end, moved apart where lines end close to each other; long names in two lines."""
    line = (
        1.5 * 12.5 / 72 / (axes.get_position().height * axes.figure.get_size_inches()[1])
    )  # of the height of the axes
    axes.get_ylim()  # settles the limits, which the transformation does not ask for
    to_axes = axes.transData + axes.transAxes.inverted()
    width = 14 if _is_narrow(axes) else 24
    below, placed = -1e9, []
    for name, x, y, color in sorted(ends, key=lambda end: end[2]):
        lines = textwrap.wrap(_NAMES.get(name, name), width, max_lines=2, placeholder="…")
        half = len(lines) * line / 2
        place = max(to_axes.transform((x, y))[1], below + half)
        below = place + half
        placed.append((lines, x, place, half, color))
    above = max(1.04, 2 * sum(half for _, _, _, half, _ in placed))
    for lines, x, place, half, color in reversed(placed):
        place = min(place, above - half)
        above = place - half
        axes.annotate(
            "\n".join(lines),
            (x, place),
            (7, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
            fontweight="bold",
            linespacing=1.0,
        )


def _rendered(figure: Any, title: str, narrow: bool) -> tuple[str, bytes]:
    from matplotlib import pyplot

    drawn, pixels = io.StringIO(), io.BytesIO()
    # The names of parts come from the salt. A page has each once: what it hides must not be referred to.
    pyplot.rcParams["svg.hashsalt"] = f"{title}, {'narrow' if narrow else 'wide'}"
    figure.savefig(
        drawn,
        format="svg",
        bbox_inches="tight",
        metadata={"Date": None, "Creator": None},
        transparent=True,
    )
    if not narrow:
        figure.savefig(
            pixels,
            format="png",
            bbox_inches="tight",
            dpi=150,
            facecolor="white",
            metadata={"Software": None},
        )
    pyplot.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :], pixels.getvalue()
