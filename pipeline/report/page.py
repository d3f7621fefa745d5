"""A self-contained HTML page of sections, with its figures and tables as files next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pipeline.evaluation.rates import Rate
from pipeline.files import whole_file, write_text
from pipeline.records import Reply
from pipeline.report.svg import Picture
from pipeline.report.tables import Table, as_csv, format_cell, interval_text, markdown, sort_key

_MARKDOWN_TABLES = (
    "overview",
    "conditions",
    "by_length",
    "recall",
    "recall_all",
    "by_instruction",
    "generalization",
    "change",
    "stop",
    "contradiction",
    "fidelity",
    "baked_leakage",
    "leakage",
    "leakage_by_trait",
    "degradation",
    "single",
    "export",
    "facts",
)
"""Tables that a reader of a model card wants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSection:
    """A part of the page: how to read it, perhaps a figure, tables, and notes below them."""

    title: str
    caption: str
    tables: Sequence[Table] = ()
    picture: Picture | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ComparedTurn:
    """One turn of an evaluation dialogue with the replies of base and tuned."""

    turn: int
    user: str
    replies: tuple[Reply, Reply]


@dataclass(frozen=True, slots=True)
class ComparedDialogue:
    """An evaluation dialogue, its instruction, and the replies to it."""

    instruction: str
    turns: Sequence[ComparedTurn]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPage:
    """The page: a headline, perhaps a chart, then the sections.

    The `dialogues` follow the section "By kind". `subject` is the line above the headline.
    """

    title: str
    headline: str
    warning: str
    chart: Picture | None
    caption: str
    sections: Sequence[ReportSection]
    dialogues: Sequence[ComparedDialogue] = ()
    subject: str = ""

    def write(self, file: Path, more_tables: Sequence[Table] = ()) -> None:
        """Write the page to `file`, and `figures/` (SVG, PNG) and `tables/` (CSV) next to it.

        `more_tables` are only written as CSV.
        """
        from jinja2 import Environment

        environment = Environment(autoescape=True)
        environment.tests["rate"] = lambda cell: isinstance(cell, Rate) and cell.n > 0
        environment.filters |= {
            "cell_text": format_cell,
            "interval": interval_text,
            "sort_key": sort_key,
        }
        source = resources.files("pipeline.report") / "report.html"
        template = environment.from_string(source.read_text(encoding="utf-8"))
        pictures = [self.chart, *(section.picture for section in self.sections)]
        for picture in filter(None, pictures):
            path = file.parent / "figures" / f"{picture.name}.svg"
            write_text(path, picture.standalone_svg)
            with whole_file(path.with_suffix(".png")) as draft:
                draft.write_bytes(picture.png)
        for table in (*more_tables, *(t for s in self.sections for t in s.tables)):
            write_text(file.parent / "tables" / f"{table.name}.csv", as_csv(table))
        write_text(file, template.render(page=self))


def as_markdown(subject: str, headline: str, sections: Sequence[ReportSection]) -> str:
    """Return the subject, the headline and the main tables in Markdown, as for a model card."""
    parts = [f"{subject}\n", f"**{headline}**\n"]
    for section in sections:
        tables = [table for table in section.tables if table.name in _MARKDOWN_TABLES]
        if tables:
            parts += [f"### {section.title}\n", f"{section.caption}\n", *map(markdown, tables)]
            parts += [f"{note}\n" for note in section.notes]
    return "\n".join(parts)
