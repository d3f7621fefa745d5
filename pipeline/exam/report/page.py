"""The page of an exam, or of several results in comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.console import log, print_result, print_table
from pipeline.evaluation.scoring.rows import rate_rows
from pipeline.evaluation.statistics import Survival, kaplan_meier, lifetimes
from pipeline.exam.arms import ONCE
from pipeline.exam.report.rows import (
    ExamRow,
    cost_points,
    exam_rows,
    model_names,
    warnings_about,
)
from pipeline.exam.report.tables import (
    cost_table,
    facts_table,
    main_table,
    regime_rows,
    regime_table,
    regimes_by_arm,
    terminal_table,
    turn_table,
)
from pipeline.exam.result import ExamResult, counted_replies
from pipeline.exam.tasks import REGIMES
from pipeline.report.figures import adherence_curve, cost_curve, survival_curve
from pipeline.report.page import ReportPage, ReportSection

_MAX_CURVES = 8
_MIN_TURNS = 2
_MAX_POINTS = 25
"""Of a line of the figure about cost; with more turns, they are means."""


class _Texts(NamedTuple):
    """What the page says about the task: the exam's own, or that of a benchmark."""

    chart: str
    given: str
    counted: str
    dialogues: str


_OF_THE_EXAM = _Texts(
    chart="Answers that keep the one instruction of the first message",
    given="the instruction is given in turn 1",
    counted="from turn 2 or the event on",
    dialogues="dialogues with one instruction in the first message",
)
_OF_A_BENCHMARK = _Texts(
    chart="Answers that pass all checks of their turn",
    given="turns without a check do not count",
    counted="from turn 1 on",
    dialogues="dialogues",
)


def publish(results: Sequence[ExamResult], page: Path) -> None:
    """Print the tables of some results, and write their page."""
    write_page(results, page)
    for warning in warnings_about(results):
        log(f"exam: {warning}")
    print_result(f"{headline(results)}\n")
    print_table(*terminal_table(results))
    print_result("\nBy regime: share kept, mean words of an answer\n")
    print_table(*regime_rows(results))
    print_result(f"\n{page}")


def write_page(results: Sequence[ExamResult], file: Path) -> None:
    """Write the page to `file`, with its figures and tables as files next to it."""
    everything, texts = exam_rows(results), _texts_of(results)
    with_curve = [row for row in everything if row.arm.by_turn]
    rows = _first_rows(with_curve)
    turns = max((len(d.marks) for row in everything for d in row.arm.dialogues), default=_MIN_TURNS)
    curves = rate_rows({(row.label, s.turn): s.adherence for row in rows for s in row.arm.by_turn})
    lives = {
        row.label: lifetimes(counted_replies(row.arm.dialogues, from_turn_1=True)).values()
        for row in rows
    }
    survival = {label: kaplan_meier(of_arm) for label, of_arm in lives.items() if of_arm}
    caption = "Mean lengths of the answers are in the tables."
    if curves:
        caption = f"{texts.chart}, by turn; bands are 95 % Wilson intervals. {caption}"
    if len(rows) < len(with_curve):
        caption += f" The first {len(rows)} arms are shown."
    page = ReportPage(
        title="gatt exam",
        headline=headline(results),
        warning=" ".join(warnings_about(results)),
        chart=adherence_curve(curves, turns, given=texts.given) if curves else None,
        caption=caption,
        sections=[
            ReportSection(
                title="Arms",
                caption="Share of the answers that do what was asked for and are valid, over all "
                f"regimes, {texts.counted}, while all messages are in the context. "
                "Intervals allow for answers of one dialogue being alike; differences are over the "
                "turns that both rows have in the context. Milliseconds are those "
                "of the whole batch, divided by its answers.",
                tables=[main_table(results), *([turn_table(results)] if with_curve else ())],
                notes=_notes(results),
            ),
            *_survival_section(survival, turns, texts.dialogues),
            ReportSection(
                title="Regimes",
                caption="Share kept, and mean words (w) of an answer.",
                notes=[
                    f"{name}: {text}."
                    for name, text in REGIMES.items()
                    if any(name in result.exam.regimes for result in results)
                ],
                tables=[regimes_by_arm(results), regime_table(results)],
            ),
            *_cost_section(results, turns),
            ReportSection(
                title="What was measured",
                caption="A result file has all verdicts; the replies are next to it.",
                tables=[facts_table(results)],
            ),
        ],
    )
    page.write(file)


def _survival_section(
    survival: Mapping[str, Survival], turns: int, dialogues: str
) -> list[ReportSection]:
    """Return the section about the first broken answer, if a dialogue is measured from turn 1."""
    if not survival:
        return []
    return [
        ReportSection(
            title="Until the first broken answer",
            caption=f"Share of the {dialogues} without a broken answer so far.",
            picture=survival_curve(survival, turns),
        )
    ]


def _cost_section(results: Sequence[ExamResult], turns: int) -> list[ReportSection]:
    """Return the section about the cost of a token, if it was measured in two turns."""
    size = -(-turns // _MAX_POINTS)
    rows = _first_rows([row for row in exam_rows(results) if len(row.arm.cost_by_turn) > 1])
    costs = {row.label: cost_points(row.arm, size) for row in rows}
    if not costs:
        return []
    means = f"means of {size} turns; " if size > 1 else ""
    picture = cost_curve(costs, turns, f"{means}all regimes")
    return [
        ReportSection(
            title="Cost by turn",
            caption="Milliseconds of the batch for each generated token, the reading of its prompt "
            "included. Each moment is divided among the answers that are being generated in it; "
            "the last ones of a batch have fewer to share with.",
            picture=picture,
            tables=[cost_table(results)],
        )
    ]


def headline(results: Sequence[ExamResult]) -> str:
    """Return how much is kept told once, and in the best other arm of the first model."""
    names = model_names(results)
    once = [
        (name, arm.adherence)
        for name, result in zip(names, results, strict=True)
        if (arm := result.arm(ONCE)) and arm.adherence.n
    ]
    reminded = [
        (arm.adherence.value, arm.name)
        for arm in results[0].arms
        if arm.name != ONCE and arm.adherence.n
    ]
    parts = []
    if once:
        shares = ", ".join(f"{name} {rate.value:.0%}" for name, rate in once)
        parts.append(f"Answers that keep an instruction, told once: {shares}")
    if reminded:
        value, best = max(reminded)
        way = "a control vector" if best.startswith("steer") else "its best reminder"
        parts.append(f"{names[0]} with {way} ({best}): {value:.0%}")
    return f"{'; '.join(parts)}." if parts else "Nothing was measured."


def _texts_of(results: Sequence[ExamResult]) -> _Texts:
    is_benchmark = any(result.exam.criteria for result in results)
    return _OF_A_BENCHMARK if is_benchmark else _OF_THE_EXAM


def _notes(results: Sequence[ExamResult]) -> list[str]:
    notes = [
        "once: told once. every: a reminder in each turn after the first. every-K: in turns "
        "K+1, 2K+1, ... depth-D: a note D messages before the end. system: what holds also "
        "stands in the system message. failed: a reminder after an answer that failed its check. "
        "steer-S: no reminder, but a control vector of strength S for what holds (steer: 1); "
        "making it is in the milliseconds."
    ]
    notes += [
        f"{name}: every turn with a check counts, from turn 1 on; an answer is kept if it passes "
        "all of them."
        for name in sorted({r.exam.name for r in results if r.exam.criteria})
    ]
    if any(r.model.training_minutes is not None for r in results):
        notes.append(
            "Training pays from the turn in which its minutes, and the trained model's time for "
            "its kept answers, are less than the reminder's time for as many kept answers."
        )
    return notes


def _first_rows(rows: Sequence[ExamRow]) -> list[ExamRow]:
    """Return the rows that a figure has room for: those told once first."""
    return sorted(rows, key=lambda row: row.arm.name != ONCE)[:_MAX_CURVES]
