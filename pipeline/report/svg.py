"""Render figures: SVG in two widths for a page, SVG and PNG as files.

Each figure is drawn twice, because the text of a wide one would be too small on a phone. Text and
axes have one color, which a page replaces by its own.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
Layout = Literal["wide", "narrow"]

TEXT_COLOR = "#1b1e23"
FONT_SIZE = 12.5
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "text.color": TEXT_COLOR,
    "axes.edgecolor": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A rendered figure: two SVGs without a background, and a PNG (150 dpi) on white.

    `name` is that of its files; `title` says what it shows, for readers who cannot see it.
    """

    name: str
    title: str
    wide_svg: str
    narrow_svg: str
    png: bytes

    @property
    def inline_svg(self) -> str:
        """Return both SVGs as HTML; the page shows one of them, in its own text color."""
        return (
            f'<span class="wide">{self._for_page(self.wide_svg)}</span>'
            f'<span class="narrow">{self._for_page(self.narrow_svg)}</span>'
        )

    @property
    def standalone_svg(self) -> str:
        """Return the wide SVG on white, for a file of its own."""
        background = '>\n <rect width="100%" height="100%" fill="#fff"/>'
        return self.wide_svg.replace(">", background, 1)

    def _for_page(self, svg: str) -> str:
        # Matplotlib numbers its groups (figure_1, axes_1) in each SVG; a page needs unique ids.
        svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace(TEXT_COLOR, "currentColor")
        label = html.escape(self.title)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def rendered(
    name: str, title: str
) -> Callable[[Callable[Concatenate[Layout, P], Figure]], Callable[P, Picture]]:
    """Decorate a function that draws a figure in a layout: it then returns a `Picture`."""

    def decorate(draw: Callable[Concatenate[Layout, P], Figure]) -> Callable[P, Picture]:
        @functools.wraps(draw)
        def render(*args: P.args, **kwargs: P.kwargs) -> Picture:
            import matplotlib

            svgs = {}
            for layout in ("narrow", "wide"):
                # Ids come from the salt. Equal ones in both SVGs would refer to the hidden one.
                style = _STYLE | {"svg.hashsalt": f"{title}, {layout}"}
                with matplotlib.rc_context(style):
                    figure = draw(layout, *args, **kwargs)
                    svgs[layout] = _svg(figure)
            return Picture(
                name=name,
                title=title,
                wide_svg=svgs["wide"],
                narrow_svg=svgs["narrow"],
                png=_png(figure),
            )

        return render

    return decorate


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(stream, format="svg", bbox_inches="tight", metadata=metadata, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    metadata = {"Software": None}
    figure.savefig(
        stream, format="png", bbox_inches="tight", dpi=150, facecolor="white", metadata=metadata
    )
    return stream.getvalue()
