"""`gatt compare`: several runs, or exams, in one table and one chart. It loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pipeline.console import log, print_result
from pipeline.errors import GattError
from pipeline.exam.inspect_eval.logs import LOG_SUFFIX, read_log
from pipeline.exam.report.page import publish
from pipeline.exam.result import read_result
from pipeline.files import write_json, write_text
from pipeline.folders import create_folder
from pipeline.report.compared.comparison import ComparedRow, Comparison, compare_runs, curve_rows
from pipeline.report.compared.fidelity import fidelity_text
from pipeline.report.compared.runs import read_run
from pipeline.report.figures import adherence_curve, fidelity_curve
from pipeline.report.page import ReportPage, ReportSection
from pipeline.report.tables import markdown
from pipeline.run_dir import stage_commands

_MAX_CURVES = 8
_NONE: Mapping[Path, Sequence[str]] = MappingProxyType({})
_FIDELITY = (
    "Reminder fidelity: how much nearer a model that is told once comes to the base that is "
    "reminded in every turn than the base told once, by the KL on the reminded base's own answers. "
    "For a baked prompt: a model without it, and the base with it."
)


def compare(
    paths: Sequence[Path], folder: Path, outdated: Mapping[Path, Sequence[str]] = _NONE
) -> None:
    """Write `compare.html`, `.md`, `.json`, chart and table to `folder`, and print the table.

    The recipe of a run may have changed since its `outdated` stages. Of results of `gatt exam`,
    which are files, and of logs of `inspect eval gatt/exam`, only the page with its tables is
    written.

    Raises:
        GattError: a run or result is named twice, is none, was not evaluated or lacks a file, or
            `folder` cannot be written.
    """
    repeated = [path for path, n in Counter(path.resolve() for path in paths).items() if n > 1]
    if repeated:
        raise GattError(f"{repeated[0]} is named twice. Name each once.")
    if any(path.is_file() for path in paths):
        results = [
            read_log(path) if path.suffix == LOG_SUFFIX else read_result(path) for path in paths
        ]
        create_folder(folder, "--out")
        publish(results, folder / "compare.html")
        return
    runs = [read_run(path) for path in paths]
    create_folder(folder, "--out")
    comparison = compare_runs(runs)
    comparison = replace(comparison, warnings=[*_changed(outdated), *comparison.warnings])
    table, fidelity, warnings = comparison.table, comparison.fidelity, comparison.warnings
    page = _page(comparison)
    page.write(folder / "compare.html")
    quoted = "".join(f"> {warning}\n\n" for warning in warnings)
    parts = [f"**{page.headline}**\n\n{quoted}{markdown(table)}"]
    if fidelity.rows:
        parts.append(f"{_FIDELITY}\n\n{markdown(fidelity)}")
    write_text(folder / "compare.md", "\n".join(parts))
    write_json(
        folder / "compare.json",
        {
            "columns": table.columns,
            "rows": table.rows,
            "fidelity": {"columns": fidelity.columns, "rows": fidelity.rows},
            "warnings": warnings,
        },
    )
    for warning in warnings:
        log(f"compare: {warning}")
    print_result(markdown(table))
    print_result(f"{folder / 'compare.html'}")


def _changed(outdated: Mapping[Path, Sequence[str]]) -> list[str]:
    """Return a warning for each run whose settings may not be those of its figures."""
    return [
        f"{path}: the recipe has changed since {stage_commands(stages)}, so the settings that are "
        "compared may not be those of its figures."
        for path, stages in outdated.items()
        if stages
    ]


def _page(comparison: Comparison) -> ReportPage:
    rows = comparison.rows
    last_turn = max(run.scores.turns for row in rows for run in row.runs)
    first = rows[0].runs[0]
    curves = curve_rows("base", [reply for reply in first.replies if reply.arm == "base"])
    for row in rows[:_MAX_CURVES]:
        curves += curve_rows(row.name, row.replies)
    caption = (
        "Evaluation dialogues that were not in the training data; bands are 95 % Wilson intervals. "
        "The base is that of the first run."
    )
    if len(rows) > _MAX_CURVES:
        caption += f" The chart shows the first {_MAX_CURVES} of {len(rows)} rows."
    runs = ReportSection(
        title="Runs",
        caption=(
            "Strict adherence: a reply counts if it obeys and is a valid answer. Differences are "
            "from the first row, in points."
        ),
        tables=[comparison.table],
    )
    sections = [runs]
    if comparison.fidelity.rows:
        by_turn = [turn for row in rows[:_MAX_CURVES] for turn in row.fidelity_by_turn]
        sections.append(
            ReportSection(
                title="Reminder fidelity",
                caption=_FIDELITY,
                tables=[comparison.fidelity],
                picture=fidelity_curve(by_turn),
            )
        )
    return ReportPage(
        title="GAtt: runs compared",
        headline=_headline(rows),
        warning=" ".join(comparison.warnings),
        chart=adherence_curve(curves, last_turn, baked=first.scores.is_baked),
        caption=caption,
        sections=sections,
    )


def _headline(rows: Sequence[ComparedRow]) -> str:
    """Return the range of the rows; which differences mean something is in the table."""
    measured = [row for row in rows if row.adherence.n]
    if not measured:
        texts = [f"{f.arm} {fidelity_text(f)}" for row in rows if (f := row.fidelity)]
        return f"No instruction has a check. Reminder fidelity: {', '.join(texts)}."
    lowest = min(measured, key=lambda row: row.adherence.value)
    highest = max(measured, key=lambda row: row.adherence.value)
    if len(measured) == 1:
        return (
            f"In the last five turns, {highest.name} keeps its instruction in "
            f"{highest.adherence.value:.0%} of the answers."
        )
    return (
        f"In the last five turns, between {lowest.adherence.value:.0%} ({lowest.name}) and "
        f"{highest.adherence.value:.0%} ({highest.name}) of the answers keep the instruction."
    )
