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
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    picture = io.StringIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, facecolor="white")
    pyplot.close(figure)
    return picture.getvalue()[picture.getvalue().index("<svg") :]
