"""Tables of a report, as Markdown, as CSV, and as the cells of an HTML page."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation.rates import Rate, wilson
from pipeline.evaluation.scores import ConditionScores, FidelityRow, RateRow, ReplyCounts, Scores
from pipeline.evaluation.statistics import Difference

Cell = str | int | float | Rate | None
"""A text, a number, a rate with its interval, or None for an empty cell."""
_NO_EXPONENT = 9999.5
"""Numbers from here on would get an exponent."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; `name` is that of the CSV file, and the first column names the rows."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def by_arm(name: str, first: str, rates: Sequence[RateRow], arms: Sequence[str]) -> Table:
    """Return a table with a row for each `RateRow.at` and a column for each measured arm."""
    cells = {(rate.at, rate.arm): rate for rate in rates}
    measured = [arm for arm in arms if any(rate.arm == arm for rate in rates)]
    rows: list[list[Cell]] = [
        [at, *(cells.get((at, arm)) for arm in measured)]
        for at in dict.fromkeys(rate.at for rate in rates)
    ]
    return Table(name, [first, *measured], rows)


def overview(scores: Scores, arms: Sequence[str]) -> Table:
    """Return the table of figures over several turns, with a column for each arm."""

    def rates(meaning: str, by_arm: Sequence[RateRow]) -> list[Cell]:
        cells = {rate.arm: rate for rate in by_arm}
        return [f"{by_arm[0].at}, {meaning}", *(cells.get(arm) for arm in arms)] if by_arm else []

    def counts(meaning: str, field: str) -> list[Cell]:
        return [f"all turns: {meaning}", *(_share(scores.replies[arm], field) for arm in arms)]

    rows: list[list[Cell]] = [
        rates("strict", scores.last_five),
        rates("valid answer or not", scores.last_five_unfiltered),
        rates("strict", scores.after_first),
        counts("obey, valid answer or not", "obey") if scores.last_five else [],
        counts("not a valid answer (loop, repeat, empty)", "no_answer"),
        counts("cut at the maximum length", "cut"),
        counts("left out (turn 1 no longer in the context window)", "left_out"),
        ["all turns: distinct word pairs (distinct-2)", *(scores.distinct_2[arm] for arm in arms)],
    ]
    return Table("overview", ["", *arms], [row for row in rows if row])


def _share(counts: ReplyCounts, field: str) -> Rate:
    n = counts.all
    if field == "obey":
        n -= counts.unchecked
    elif field == "left_out":
        n += counts.left_out
    return wilson(getattr(counts, field), n)


def conditions_table(conditions: Sequence[ConditionScores]) -> Table:
    """Return a row for each model, sampler and length, with the difference from the evaluation."""
    columns = ["model", "sampler", "turns", "adherence", "evaluation", "points from the evaluation"]
    rows: list[list[Cell]] = [
        [row.arm, _sampler_name(scores), row.at, row, row.main, points_text(row.difference)]
        for scores in conditions
        for row in scores.rows
    ]
    return Table("conditions", columns, rows)


def _sampler_name(scores: ConditionScores) -> str:
    values = scores.values
    if scores.sampler == "gatt":
        return "as in the evaluation"
    if not values["temperature"]:
        return "greedy"
    dry = "DRY" if values["dry_multiplier"] else "no DRY"
    return (
        f"{scores.sampler}: temperature {values['temperature']:g}, top-k {values['top_k']:g}, "
        f"top-p {values['top_p']:g}, min-p {values['min_p']:g}, {dry}"
    )


def points_text(difference: Difference) -> str:
    """Return a difference in points with its interval: "+3 (-2 to +8)"; "" if there is none."""
    if math.isnan(difference.difference):
        return ""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.difference:+.0f} ({low:+.0f} to {high:+.0f})"


def fidelity_table(name: str, first: str, rows: Sequence[FidelityRow]) -> Table:
    """Return a row for each turn or instruction, with three columns for each model."""
    columns = [first, "base: nats per token"]
    for arm in dict.fromkeys(row.arm for row in rows):
        columns += [f"{arm}: nats per token", f"{arm}: fidelity", f"{arm}: 95 % interval"]
    cells: dict[int | str, list[Cell]] = {}
    for row in rows:
        fidelity = None if math.isnan(row.value) else f"{row.value:.0%}"
        of_base: list[Cell] = [row.at, row.base_kl]
        cells.setdefault(row.at, of_base).extend((row.kl, fidelity, fidelity_interval(row)))
    return Table(name, columns, list(cells.values()))


def fidelity_interval(row: FidelityRow) -> str:
    """Return the interval of a fidelity as "30 to 95%"; "" where one dialogue gives none."""
    return "" if math.isnan(row.low) else f"{100 * row.low:.0f} to {row.high:.0%}"


def curve_tables(scores: Scores, losses: Sequence[float], arms: Sequence[str]) -> Iterator[Table]:
    """Yield the numbers of the figures, for those of which the page has no table."""
    yield by_arm("by_turn", "turn", scores.by_turn, arms)
    yield Table(
        "survival_by_turn",
        ["model", "turn", "value", "low", "high"],
        [
            [arm, step.turn, step.value, step.low, step.high]
            for arm, survival in scores.survival.items()
            for step in survival.steps
        ],
    )
    if scores.change:
        yield Table(
            "change_by_turn",
            ["model", "turn", "old", "new", "n"],
            [
                [arm, row.turn, row.old, row.new, row.n]
                for arm, change in scores.change.items()
                for row in change.by_turn
            ],
        )
    if losses:
        yield Table("loss", ["step", "loss"], list(enumerate(losses, 1)))


def format_cell(cell: Cell) -> str:
    """Return the text of a cell; a rate is "75% (3 of 4)"."""
    if isinstance(cell, Rate):
        return f"{cell.value:.0%} ({cell.hits} of {cell.n})" if cell.n else ""
    if isinstance(cell, float):
        if math.isnan(cell):
            return ""
        return f"{cell:.4g}" if abs(cell) < _NO_EXPONENT else f"{cell:.0f}"
    return "" if cell is None else str(cell)


def interval_text(rate: Rate) -> str:
    """Return the 95 % interval of a rate as "30 to 95%"."""
    return f"{100 * rate.low:.0f} to {rate.high:.0%}"


def sort_key(cell: Cell) -> float | str:
    """Return what a column is sorted by; "" for an empty cell."""
    if isinstance(cell, Rate):
        cell = cell.value if cell.n else None
    if isinstance(cell, str) and re.fullmatch(r"[+-]?[\d.]+%", cell):
        return float(cell[:-1])
    return "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else cell


def markdown(table: Table) -> str:
    """Return the table in Markdown."""
    names, *rows = (
        [" ".join(format_cell(cell).replace("|", "\\|").split()) for cell in row]
        for row in (table.columns, *table.rows)
    )
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(table: Table) -> str:
    """Return the table as CSV.

    A rate takes five columns: value, low and high end of the interval, hits, n.
    """
    has_rates = [
        any(isinstance(row[column], Rate) for row in table.rows)
        for column in range(len(table.columns))
    ]
    header: list[str] = []
    for name, rates in zip(table.columns, has_rates, strict=True):
        header += [name, *(f"{name} {part}" for part in ("low", "high", "hits", "n"))][
            : 5 if rates else 1
        ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        writer.writerow(
            value
            for cell, rates in zip(row, has_rates, strict=True)
            for value in (_five_columns(cell) if rates else (cell,))
        )
    return stream.getvalue()


def _five_columns(cell: Cell) -> tuple[Cell, ...]:
    """Return a rate in its five columns; a plain number in a column of rates is only a value."""
    if isinstance(cell, Rate):
        return (cell.value if cell.n else None, cell.low, cell.high, cell.hits, cell.n)
    return (cell, None, None, None, None)
