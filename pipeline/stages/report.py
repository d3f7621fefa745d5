"""`gatt report`: render the results of a run as a page, Markdown, figures and tables.

It loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.console import print_result
from pipeline.evaluation.scores import RateRow, Scores
from pipeline.files import write_json, write_text
from pipeline.recipe import Recipe
from pipeline.report.facts import public_name
from pipeline.report.figures import adherence_curve
from pipeline.report.page import ReportPage, as_markdown
from pipeline.report.results import RunResults, read_results
from pipeline.report.sections import SECTIONS as REPORT_SECTIONS
from pipeline.report.sections.headline import headline
from pipeline.report.tables import curve_tables
from pipeline.run_dir import RunDir

_PRINTED = ("Over several turns", "Recall")
"""Sections that are printed, too."""
_OFTEN_CUT = 0.05
"""Share of the base's replies from which the caption says that they are cut."""

SECTIONS = ("evaluate",)
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [run_dir.scores, run_dir.exported]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Write `report/report.html`, `.json` and `.md`, figures and tables, and print a summary."""
    results = read_results(recipe, run_dir)
    page = report_page(results)
    tables = curve_tables(results.scores, results.losses, results.arms)
    page.write(run_dir.report / "report.html", list(tables))
    chart = run_dir.report / "adherence.svg"
    chart.unlink(missing_ok=True)
    if page.chart:
        write_text(chart, page.chart.standalone_svg)
    write_json(
        run_dir.report / "report.json",
        {
            "subject": page.subject,
            "headline": page.headline,
            "warning": page.warning,
            "has_chart": page.chart is not None,
            "facts": results.facts,
            "scores": results.scores,
            "conditions": results.conditions,
            "export": results.export,
        },
    )
    write_text(
        run_dir.report / "report.md", as_markdown(page.subject, page.headline, page.sections)
    )
    printed = [section for section in page.sections if section.title in _PRINTED]
    print_result(as_markdown(page.subject, page.headline, printed))


def report_page(results: RunResults) -> ReportPage:
    """Build the page of a run."""
    settings, scores, plotted = results.recipe.evaluate, results.scores, results.plotted_arms
    curves = _curves(scores, plotted)
    baked = scores.is_baked
    caption = f"{results.measured_dialogues} dialogues that were not in the training data"
    if curves:
        caption += (
            "; bands are 95 % Wilson intervals. A reply counts if it obeys and is a valid answer "
            "(not a loop, a repeat or empty)"
        )
    caption += ". Small type in the tables: the 95 % interval and the counts."
    if curves and not baked:
        caption += _base_text(scores, settings.max_tokens)
    if len(plotted) < len(results.arms):
        caption += f" Figures show {len(plotted)} of {len(results.arms)} models, tables all."
    sections = [build(results) for build in REPORT_SECTIONS]
    return ReportPage(
        title=f"GAtt report: {public_name(results.recipe.model)}",
        headline=headline(scores),
        warning=results.warning,
        chart=adherence_curve(curves, scores.turns, baked=baked) if curves else None,
        caption=caption,
        sections=[section for section in sections if section],
        dialogues=results.dialogues,
        subject=results.subject,
    )


def _base_text(scores: Scores, max_tokens: int) -> str:
    """Return what the base and the ceiling are, and whether the limit may hide what they obey."""
    ceiling = "; ceiling: the base, reminded in every turn" if "ceiling" in scores.replies else ""
    text = f" Base: the model before training{ceiling}."
    if scores.unseen_by_turn:
        text += " Curves without another name are of trained instructions."
    base = scores.replies.get("base")
    if base and base.cut > _OFTEN_CUT * base.all:
        text += (
            f" {base.cut} of {base.all} replies of the base are cut at {max_tokens} tokens, "
            "which can hide an ending."
        )
    return text


def _curves(scores: Scores, arms: Sequence[str]) -> list[RateRow]:
    """Return adherence by turn of `arms`, and that of tuned to instructions not trained.

    There are none where no program checks what is trained.
    """
    if not scores.by_turn:
        return []
    unseen = [
        replace(row, arm=f"tuned, {row.group}s")
        for row in scores.unseen_by_turn
        if row.arm == "tuned"
    ]
    return [*(row for arm in arms for row in scores.by_turn if row.arm == arm), *unseen]
