"""The tables of an exam: on the terminal, and as tables of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.evaluation.rates import Rate
from pipeline.evaluation.statistics import Difference
from pipeline.exam.arms import ONCE
from pipeline.exam.machine import is_one_machine
from pipeline.exam.report.rows import (
    ExamRow,
    comparable,
    compares_windows,
    cost_in,
    differences,
    exam_rows,
    full_differences,
    model_names,
    turns_to_pay,
)
from pipeline.exam.result import ArmResult, ExamResult, is_measured_from_turn_1
from pipeline.exam.tasks import ordered_regimes
from pipeline.report.tables import Cell, Table, interval_text

_EARLY_TURN = 2
"""Which later turns are compared with: turn 1 has no history."""


def terminal_table(results: Sequence[ExamResult]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table that the command prints."""
    rows, several = exam_rows(results), len(results) > 1
    columns: dict[str, list[str]] = {}
    if several:
        names = model_names(results)
        columns["model"] = [
            name for name, result in zip(names, results, strict=True) for _ in result.arms
        ]
    columns |= {
        "arm": [row.arm.name for row in rows],
        "kept": [_percent(row.arm.adherence) for row in rows],
        "95 %": [interval_text(row.arm.adherence) if row.arm.adherence.n else "" for row in rows],
        "words": [_number(row.arm.words) for row in rows],
    }
    if len(rows) > 1 and comparable(results):
        columns["vs first row"] = [_difference(d) for d in differences(rows)]
    columns |= {
        "last 5 turns": [_percent(row.arm.last_five) for row in rows],
        "cut": [_percent(row.arm.cut) for row in rows],
        "loops": [_percent(row.arm.loops) for row in rows],
        "+tokens/kept": [_number(row.arm.reminder_tokens_per_kept) for row in rows],
        "ms/kept": [_number(row.arm.milliseconds_per_kept) for row in rows],
    }
    if any(row.arm.full_window.n for row in rows):
        columns["context full"] = [_percent(row.arm.full_window) for row in rows]
        if compares_windows(results):
            columns["full vs first row"] = [_difference(d) for d in full_differences(rows)]
    columns |= _paying(results, rows)
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def regime_rows(results: Sequence[ExamResult]) -> tuple[list[str], list[list[str]]]:
    """Return a row for each arm with adherence and mean words in each regime."""
    measured = _regime_names(results)
    rows = []
    for row in exam_rows(results):
        scores = {score.regime: score for score in row.arm.regimes}
        cells = [
            f"{_percent(scores[name].adherence)}, {_number(scores[name].words)} w"
            if name in scores
            else ""
            for name in measured
        ]
        rows.append([row.label, *cells])
    return ["arm", *measured], rows


def regimes_by_arm(results: Sequence[ExamResult]) -> Table:
    """Return `regime_rows` as the page's table."""
    columns, rows = regime_rows(results)
    return Table("regimes_by_arm", columns, rows)


def main_table(results: Sequence[ExamResult]) -> Table:
    """Return the page's table of all arms."""
    rows = exam_rows(results)
    columns: dict[str, list[Cell]] = {
        "arm": [row.label for row in rows],
        "kept": [row.arm.adherence for row in rows],
        "words per answer": [_rounded(row.arm.words) for row in rows],
    }
    if len(rows) > 1 and comparable(results):
        columns["points above the first row (95 %)"] = [_difference(d) for d in differences(rows)]
    columns |= {
        "last five turns": [row.arm.last_five for row in rows],
        "half of the dialogues broken by turn": [_half_broken(row.arm) for row in rows],
        "cut at the limit": [row.arm.cut for row in rows],
        "loops": [row.arm.loops for row in rows],
        "not valid (loop, repeat, empty)": [row.arm.invalid for row in rows],
        "reminder tokens per kept answer": [
            _rounded(row.arm.reminder_tokens_per_kept) for row in rows
        ],
        "ms per kept answer": [_rounded(row.arm.milliseconds_per_kept) for row in rows],
    }
    if any(row.arm.full_window.n for row in rows):
        columns["kept, context full"] = [row.arm.full_window for row in rows]
        if compares_windows(results):
            columns["points above the first row, context full (95 %)"] = [
                _difference(d) for d in full_differences(rows)
            ]
    paying: dict[str, list[Cell]] = {k: list(v) for k, v in _paying(results, rows).items()}
    columns |= paying
    return Table("exam", list(columns), list(zip(*columns.values(), strict=True)))


def _half_broken(arm: ArmResult) -> Cell:
    """Return the turn, or "never"; None where no dialogue is measured from turn 1 on."""
    is_measured = any(is_measured_from_turn_1(d.regime, d.first_counted) for d in arm.dialogues)
    return arm.half_broken or ("never" if is_measured else None)


def regime_table(results: Sequence[ExamResult]) -> Table:
    """Return a row for each regime and arm."""
    cells: list[list[Cell]] = [
        [name, row.label, score.adherence, _rounded(score.words), score.cut]
        for name in _regime_names(results)
        for row in exam_rows(results)
        for score in row.arm.regimes
        if score.regime == name
    ]
    columns = ["regime", "arm", "kept", "words per answer", "cut at the limit"]
    return Table("regimes", columns, cells)


def turn_table(results: Sequence[ExamResult]) -> Table:
    """Return adherence and mean words of each turn in the regime "first"."""
    cells: list[list[Cell]] = [
        [score.turn, row.label, score.adherence, _rounded(score.words)]
        for row in exam_rows(results)
        for score in row.arm.by_turn
    ]
    return Table("by_turn", ["turn", "arm", "kept", "words per answer"], cells)


def cost_table(results: Sequence[ExamResult]) -> Table:
    """Return the milliseconds per generated token in turn 2 and in the last turn of each arm."""
    cells: list[list[Cell]] = []
    for row in exam_rows(results):
        last = max((cost.turn for cost in row.arm.cost_by_turn), default=0)
        early, late = cost_in(row.arm, _EARLY_TURN), cost_in(row.arm, last)
        if early and late and last > _EARLY_TURN:
            cells.append([row.label, _rounded(early), last, _rounded(late), round(late / early, 2)])
    columns = ["arm", "ms per token in turn 2", "last turn", "ms per token there", "times"]
    return Table("cost", columns, cells)


def facts_table(results: Sequence[ExamResult]) -> Table:
    """Return what the results depend on, a column for each model."""
    rows: list[list[Cell]] = [
        ["exam", *(f"{r.exam.name} {r.exam.version}" for r in results)],
        ["SHA-256 of the set", *(r.exam.sha256[:16] for r in results)],
        ["turns", *(r.exam.turns or "until the context is full" for r in results)],
        ["dialogues", *(r.exam.dialogues for r in results)],
        ["sampler", *(_sampler(r) for r in results)],
        ["seed", *(r.settings.seed for r in results)],
        ["most tokens of an answer", *(r.settings.max_tokens for r in results)],
        ["context", *(r.settings.context or "the server's" for r in results)],
        ["when it is full", *(r.settings.window for r in results)],
        ["system message", *(_system_role(r) for r in results)],
        ["SHA-256 of the model", *(r.model.sha256[:16] or r.model.server for r in results)],
        ["SHA-256 of the adapter", *(r.model.adapter_sha256[:16] for r in results)],
        ["training, minutes", *(r.model.training_minutes for r in results)],
        ["machine", *(r.machine for r in results)],
        ["gatt", *(r.gatt for r in results)],
        ["date", *(r.date for r in results)],
    ]
    names = ["", *model_names(results)]
    return Table("facts", names, [row for row in rows if set(row[1:]) - {"", None}])


def _regime_names(results: Sequence[ExamResult]) -> list[str]:
    return ordered_regimes(name for result in results for name in result.exam.regimes)


def _paying(results: Sequence[ExamResult], rows: Sequence[ExamRow]) -> dict[str, list[str]]:
    """Return a column for each trained model: from which turn on it is cheaper than a reminder.

    Only times of one machine are compared.
    """
    columns = {}
    if any(row.is_training_free for row in rows) and comparable(results):
        for name, result in zip(model_names(results), results, strict=True):
            once, minutes = result.arm(ONCE), result.model.training_minutes
            if once is None or minutes is None:
                continue
            cells = [
                turns_to_pay(row.arm, once, minutes)
                if row.is_training_free and is_one_machine(row.result.machine, result.machine)
                else ""
                for row in rows
            ]
            if any(cells):
                columns[f"{name} pays from turn"] = cells
    return columns


def _sampler(result: ExamResult) -> str:
    values = [f"{name} {value:g}" for name, value in result.sampler.items()]
    if result.model.server:
        values.append("the rest is the server's own" if values else "the server's own")
    return f"{result.settings.sampler} ({', '.join(values)})"


def _system_role(result: ExamResult) -> str:
    return "its own" if result.settings.system_role else "before the first user message"


def _percent(rate: Rate) -> str:
    return f"{rate.value:.0%}" if rate.n else ""


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 1)


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    points, low, high = (100 * x for x in (difference.difference, difference.low, difference.high))
    return f"{points:+.0f} ({low:+.0f} to {high:+.0f})"
