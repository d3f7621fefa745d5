"""Pictures: numbers in, SVG out."""

from __future__ import annotations

import io
from typing import Any

_STYLE = {"base": ("#b4552d", "o", "base"), "tuned": ("#1f6f8b", "s", "GAtt-tuned"),
          "ceiling": ("#8a8a8a", "", "base, told every turn")}  # fmt: skip


def adherence_curve(rows: list[dict[str, Any]], turns: int) -> str:
    """Adherence by turn for each arm, with its 95 % interval, as SVG. `rows` is `by_turn` of the scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "gatt"
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    for arm, (colour, marker, name) in _STYLE.items():
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["at"])
        if not mine:
            continue
        at = [r["at"] for r in mine]
        axes.fill_between(at, [r["low"] for r in mine], [r["high"] for r in mine], color=colour, alpha=0.13, linewidth=0)
        dashes = "--" if arm == "ceiling" else "-"
        axes.plot(at, [r["value"] for r in mine], dashes, color=colour, marker=marker, markersize=4, label=name)
    axes.set(xlim=(0.5, turns + 0.5), ylim=(-0.02, 1.04), xlabel="turn (the instruction is given in turn 1)",
             ylabel="answers that keep the instruction")  # fmt: skip
    axes.set_xticks(range(1, turns + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _drawn(figure, axes)


def survival_curve(survival: dict[str, Any], turns: int) -> str:
    """The share of dialogues without a broken answer so far, for each arm, with its 95 % interval, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "gatt"
    figure, axes = pyplot.subplots(figsize=(8, 3.4))
    for arm, (colour, _, name) in _STYLE.items():
        steps = survival.get(arm, {}).get("steps", [])
        if not steps:
            continue
        at, value, low, high = ([s[key] for s in steps] for key in ("turn", "value", "low", "high"))
        axes.fill_between([0.5, *at], [1, *low], [1, *high], step="post", color=colour, alpha=0.13, linewidth=0)
        axes.step([0.5, *at], [1, *value], "--" if arm == "ceiling" else "-", where="post", color=colour, label=name)
    axes.set(xlim=(0.5, turns + 0.5), ylim=(-0.02, 1.04), xlabel="turn", ylabel="dialogues not broken so far")
    axes.set_xticks(range(1, turns + 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _drawn(figure, axes)


def attention_picture(maps: dict[str, Any]) -> str:
    """What answers attend to, base beside tuned, and the share that falls on the instruction by turn, as SVG.

    `maps`: for each arm `strongest` (rows of answers, columns of the dialogue so far), `turns`, `instruction` and `share`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "gatt"
    figure, (base, tuned, share) = pyplot.subplots(1, 3, figsize=(11, 3.9), width_ratios=(1, 1, 1.1), layout="constrained")
    for arm, axes in (("base", base), ("tuned", tuned)):
        found = maps[arm]
        axes.imshow(found["strongest"], aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes.axvspan(found["instruction"][0] - 0.5, found["instruction"][1] + 0.5, color=_STYLE[arm][0], alpha=0.35, linewidth=0)
        turns = found["turns"]
        firsts = [turns.index(turn) for turn in sorted(set(turns)) if turn in (1, 5, 10, 15, 20)]
        axes.set_yticks(firsts, [f"turn {turns[row]}" for row in firsts])
        axes.set(title=_STYLE[arm][2], xlabel="the dialogue so far (the band: the instruction)")
        axes.set_xticks([])
        share.plot(range(1, len(found["share"]) + 1), found["share"], color=_STYLE[arm][0], marker=_STYLE[arm][1], markersize=3)
        # Both lines end near zero: their names stand one above the other.
        above = -5 if arm == "base" else 6
        share.annotate(_STYLE[arm][2], (len(found["share"]), found["share"][-1]), (4, above), textcoords="offset points",
                       color=_STYLE[arm][0], va="center")  # fmt: skip
    share.set(title="attention on the instruction", xlabel="turn", ylim=(0, None))
    share.xaxis.get_major_locator().set_params(integer=True)
    share.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    share.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _drawn(figure: Any, axes: Any) -> str:
    """The figure with its legend as SVG."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return _svg(figure)


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    picture = io.StringIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, facecolor="white")
    pyplot.close(figure)
    return picture.getvalue()[picture.getvalue().index("<svg") :]
