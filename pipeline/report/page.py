"""A self-contained page of sections, with the figures and tables in it as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from pipeline.files import whole_file, write_text
from pipeline.report.figures import Picture
from pipeline.report.tables import Table, as_csv, format_cell, interval_text, sort_key


@dataclass(frozen=True)
class ReportSection:
    """A part of the page: how to read it, perhaps a figure (by its file's name), tables, and remarks below."""

    title: str
    how: str
    tables: Sequence[Table] = ()
    figure: str = ""
    picture: Picture | None = None
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class ReportPage:
    """What a reader sees: one sentence and one chart, then the sections. `dialogues` stand behind "By instruction"."""

    title: str
    sentence: str
    warning: str
    chart: Picture
    how: str
    sections: Sequence[ReportSection]
    dialogues: Sequence[dict[str, Any]] = ()

    def write(self, file: Path, tables: Sequence[Table] = ()) -> None:
        """Write `file`, and beside it `figures/` (SVG, PNG) and `tables/` (CSV), these with the further `tables`."""
        template = Environment(autoescape=True).from_string(
            (resources.files("pipeline.report") / "report.html").read_text(encoding="utf-8")
        )
        figures = {
            "adherence": self.chart,
            **{s.figure: s.picture for s in self.sections if s.picture},
        }
        for name, picture in figures.items():
            write_text(file.parent / "figures" / f"{name}.svg", picture.alone)
            with whole_file(file.parent / "figures" / f"{name}.png") as draft:
                draft.write_bytes(picture.png)
        for table in (*tables, *(t for s in self.sections for t in s.tables)):
            write_text(file.parent / "tables" / f"{table.name}.csv", as_csv(table))
        write_text(
            file, template.render(page=self, shown=format_cell, hint=interval_text, key=sort_key)
        )
