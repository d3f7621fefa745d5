"""Tables of a report: the same rows as HTML cells, Markdown and CSV. A cell is a text, a number, or a rate with its interval."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.rates import wilson

_COUNTS = {
    "obey": "obey, good answer or not",
    "no_answer": "are no answer (loop, repeat, empty)",
    "cut": "cut at the longest length allowed",
    "left_out": "left out: turn 1 had left the window",
}
_PARTS = ("value", "low", "high", "hits", "n")

Cell = Any
"""A text, a number, None for nothing, or a rate: {"hits", "n", "value", "low", "high"}."""


@dataclass(frozen=True)
class Table:
    """`name` is that of its CSV file; the first of the `columns` names the rows."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def by_arm(name: str, first: str, rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> Table:
    """Rates as the scores hold them, {"arm", "at", ...}: a row for each `at`, a column for each arm that has some."""
    found = {(row["at"], row["arm"]): row for row in rows}
    present = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    places = list(dict.fromkeys(row["at"] for row in rows))
    return Table(
        name, [first, *present], [[at, *(found.get((at, arm)) for arm in present)] for at in places]
    )


def overview(scores: dict[str, Any], arms: Sequence[str]) -> Table:
    """A row for each figure over several turns, a column for each arm."""

    def row(name: str, table: str) -> list[Any]:
        found = {r["arm"]: r for r in scores[table]}
        return [name.format(at=scores[table][0]["at"]), *(found.get(arm) for arm in arms)]

    rows = [row("{at}, strict", "last_five"), row("{at}, strict", "after_first")]
    if scores.get("last_five_unfiltered"):
        rows.insert(1, row("{at}, whether a good answer or not", "last_five_unfiltered"))
    for name, meaning in _COUNTS.items():
        counts = [scores["replies"][arm] for arm in arms]
        rows.append(
            [
                f"all turns: {meaning}",
                *(asdict(wilson(count[name], count["all"])) for count in counts),
            ]
        )
    rows.append(
        [
            "all turns: different pairs of words, of all (distinct-2)",
            *(scores["distinct_2"][arm] for arm in arms),
        ]
    )
    return Table("overview", ["", *arms], rows)


def curves(scores: dict[str, Any], losses: Sequence[float]) -> Iterator[Table]:
    """The numbers behind the curves that a page shows as pictures only."""
    yield Table(
        "survival_by_turn",
        ["model", "turn", "value", "low", "high"],
        [
            [arm, *(step[sort_key] for sort_key in ("turn", "value", "low", "high"))]
            for arm, found in scores["survival"].items()
            for step in found["steps"]
        ],
    )
    if scores.get("change"):
        yield Table(
            "change_by_turn",
            ["model", "turn", "old", "new", "n"],
            [
                [arm, *(row[sort_key] for sort_key in ("at", "old", "new", "n"))]
                for arm, found in scores["change"].items()
                for row in found["by_turn"]
            ],
        )
    if losses:
        yield Table("loss", ["step", "loss"], list(enumerate(losses, 1)))


def format_cell(cell: Cell) -> str:
    """The cell as a reader sees it."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, dict):
        return f"{cell['value']:.0%} ({cell['hits']} of {cell['n']})" if cell["n"] else ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def interval_text(cell: Cell) -> str:
    """The 95 % interval of a rate."""
    return (
        f"{100 * cell['low']:.0f} to {cell['high']:.0%}"
        if isinstance(cell, dict) and cell["n"]
        else ""
    )


def sort_key(cell: Cell) -> float | str:
    """What a column is sorted by."""
    if isinstance(cell, dict):
        return cell["value"] if cell["n"] else ""
    if isinstance(cell, str) and re.fullmatch(r"[+-]?[\d.]+%", cell):
        return float(cell[:-1])
    return "" if cell is None or cell != cell else cell


def markdown(table: Table) -> str:
    """The table in Markdown."""
    names, *rows = (
        [" ".join(format_cell(cell).replace("|", "\\|").split()) for cell in row]
        for row in (table.columns, *table.rows)
    )
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(table: Table) -> str:
    """The table as CSV, a rate in five columns: its value, both ends of the interval, hits and n."""
    rates = [
        n for n in range(len(table.columns)) if any(isinstance(row[n], dict) for row in table.rows)
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        title
        for n, name in enumerate(table.columns)
        for title in ([name, *(f"{name} {part}" for part in _PARTS[1:])] if n in rates else [name])
    )
    for row in table.rows:
        writer.writerow(
            value
            for n, cell in enumerate(row)
            for value in (_parts(cell) if n in rates else [cell])
        )
    return out.getvalue()


def _parts(cell: Cell) -> list[Any]:
    """A rate in its five columns; a plain number among rates is a value without the others."""
    return (
        [cell[part] for part in _PARTS]
        if isinstance(cell, dict)
        else [cell, *[None] * (len(_PARTS) - 1)]
    )
