"""Pictures: numbers in, SVG and PNG out. Text and axes are drawn in one colour, which a page replaces by its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

Rows = list[dict[str, Any]]

_TEXT = "#1b1e23"
_STYLES = {"base": ("#d1602c", "o", "-"), "tuned": ("#2a8fb4", "s", "-"), "ceiling": ("#868b93", "", "--")}
_OTHERS = (
    ("#9467bd", "^", "-."), ("#4d9a3b", "D", ":"), ("#c0568f", "v", "-."), ("#a08328", "P", ":"), ("#2a8fb4", "s", "-"),
    ("#b23b3b", "X", "--"), ("#3f6fd1", "<", "-."), ("#6b7d2a", ">", ":"),
)  # fmt: skip
_NAMES = {"tuned": "GAtt-tuned", "ceiling": "base, told every turn"}


class Picture(NamedTuple):
    """A figure as SVG on no ground, and as PNG (150 dpi) on white."""

    svg: str
    png: bytes

    @property
    def inline(self) -> str:
        """The SVG for a page: its text takes the colour of the page's."""
        return self.svg.replace(_TEXT, "currentColor")

    @property
    def alone(self) -> str:
        """The SVG as a file of its own: on white, whatever shows it."""
        return self.svg.replace("<svg ", '<svg style="background:#fff" ', 1)


def adherence_curve(rows: Rows, turns: int) -> Picture:
    """Adherence by turn for each arm, with its 95 % interval,. `rows` is `by_turn` of the scores."""
    figure, axes = _figure(4.2)
    ends = []
    for arm, style in _styled([r["arm"] for r in rows]).items():
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["at"])
        at = [r["at"] for r in mine]
        _band(axes, at, [r["low"] for r in mine], [r["high"] for r in mine], style)
        _line(axes, at, [r["value"] for r in mine], style)
        ends.append((arm, at[-1], mine[-1]["value"], style[0]))
    _by_turn(axes, turns, "turn (the instruction is given in turn 1)", "answers that keep the instruction")
    _labels(axes, ends)
    return _picture(figure)


def survival_curve(survival: dict[str, Any], turns: int) -> Picture:
    """The share of dialogues without a broken answer so far, for each arm, with its 95 % interval."""
    figure, axes = _figure(3.4)
    ends = []
    for arm, style in _styled(survival).items():
        steps = survival[arm]["steps"]
        if not steps:
            continue
        at, value, low, high = ([s[key] for s in steps] for key in ("turn", "value", "low", "high"))
        axes.fill_between([0.5, *at], [1, *low], [1, *high], step="post", color=style[0], alpha=0.16, linewidth=0)
        axes.step([0.5, *at], [1, *value], style[2], where="post", color=style[0])
        ends.append((arm, at[-1], value[-1], style[0]))
    _by_turn(axes, turns, "turn", "dialogues not broken so far")
    _labels(axes, ends)
    return _picture(figure)


def change_curve(change: dict[str, Any]) -> Picture:
    """Adherence of base and tuned to the old instruction (dashed) and to the new one, by turn."""
    figure, axes = _figure(3.2)
    ends = []
    turns = 1
    for arm, style in _styled(change).items():
        rows = change[arm]["by_turn"]
        turns = max(turns, rows[-1]["at"])
        axes.plot([r["at"] for r in rows], [r["old"] for r in rows], "--", color=style[0], linewidth=1.2)
        _line(axes, [r["at"] for r in rows], [r["new"] for r in rows], (style[0], style[1], "-"))
        ends.append((arm, rows[-1]["at"], rows[-1]["new"], style[0]))
    axes.axvline(max(found["at"] for found in change.values()) - 0.5, color=_TEXT, linewidth=0.8, linestyle=":")
    _by_turn(axes, turns, "turn (the instruction changes at the dotted line; dashed: the old one)", "answers that keep it")
    _labels(axes, ends)
    return _picture(figure)


def loss_curve(losses: Sequence[float]) -> Picture:
    """The loss of every training step."""
    figure, axes = _figure(2.8)
    axes.plot(range(1, len(losses) + 1), losses, color=_STYLES["tuned"][0], linewidth=1.4)
    axes.set(xlim=(0.5, len(losses) + 0.5), ylim=(0, None), xlabel="step", ylabel="loss, nats a token")
    return _picture(figure)


def attention_picture(maps: dict[str, Any]) -> Picture:
    """What answers attend to, base beside tuned, and the share that falls on the instruction by turn.

    `maps`: for each arm `strongest` (rows of answers, columns of the dialogue so far), `turns`, `instruction` and `share`.
    """
    pyplot = _pyplot()
    figure, (base, tuned, share) = pyplot.subplots(1, 3, figsize=(11, 3.9), width_ratios=(1, 1, 1.1), layout="constrained")
    ends = []
    for arm, axes in (("base", base), ("tuned", tuned)):
        found, (colour, marker, _) = maps[arm], _STYLES[arm]
        axes.imshow(found["strongest"], aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.axvspan(found["instruction"][0] - 0.5, found["instruction"][1] + 0.5, color=colour, alpha=0.35, linewidth=0)
        turns = found["turns"]
        firsts = [turns.index(turn) for turn in sorted(set(turns)) if turn in (1, 5, 10, 15, 20)]
        axes.set_yticks(firsts, [f"turn {turns[row]}" for row in firsts])
        axes.set(title=_NAMES.get(arm, arm), xlabel="the dialogue so far (the band: the instruction)")
        axes.set_xticks([])
        _line(share, list(range(1, len(found["share"]) + 1)), found["share"], (colour, marker, "-"))
        ends.append((arm, len(found["share"]), found["share"][-1], colour))
    share.set(title="attention on the instruction", xlabel="turn", ylim=(0, None))
    _labels(share, ends)
    share.xaxis.get_major_locator().set_params(integer=True)
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    share.spines[["top", "right"]].set_visible(False)
    return _picture(figure)


def _styled(arms: Any) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dashes for base, tuned, ceiling and up to eight other arms, in the order that they come in."""
    others = iter(_OTHERS)
    found = {}
    for arm in dict.fromkeys(arms):
        style = _STYLES.get(arm) or next(others, None)
        if style:
            found[arm] = style
    return found


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.hashsalt": "gatt", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12.5, "text.color": _TEXT,
        "axes.edgecolor": _TEXT, "axes.labelcolor": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT,
    })  # fmt: skip
    return pyplot


def _figure(height: float) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(figsize=(7, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Any, at: Sequence[float], values: Sequence[float], style: tuple[str, str, str]) -> None:
    colour, marker, dashes = style
    axes.plot(at, values, dashes, color=colour, marker=marker, markersize=4, linewidth=1.8)


def _band(axes: Any, at: Sequence[float], low: Sequence[float], high: Sequence[float], style: tuple[str, str, str]) -> None:
    axes.fill_between(at, low, high, color=style[0], alpha=0.16, linewidth=0)


def _by_turn(axes: Any, turns: int, along: str, up: str) -> None:
    axes.set(xlim=(0.5, turns + 0.5), ylim=(-0.02, 1.04), xlabel=along, ylabel=up)
    axes.set_xticks([1, *range(5, turns + 1, 5)] if turns > 10 else range(1, turns + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _labels(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """The name of each line at its end, moved apart where lines end close to each other."""
    low, high = axes.get_ylim()
    room = 0.085 * (high - low) * 4.2 / axes.figure.get_size_inches()[1]
    at = -1e9
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        at = max(y, at + room)
        axes.annotate(
            _NAMES.get(name, name), (x, at), (7, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False,
            fontweight="bold",
        )  # fmt: skip


def _picture(figure: Any) -> Picture:
    from matplotlib import pyplot

    drawn, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(drawn, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, transparent=True)
    figure.savefig(pixels, format="png", bbox_inches="tight", dpi=150, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return Picture(drawn.getvalue()[drawn.getvalue().index("<svg") :], pixels.getvalue())
