"""Tables of a report: the same rows as HTML cells, Markdown and CSV. A cell is a text, a number, or a rate with its interval."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    return Table(name, [first, *present], [[at, *(found.get((at, arm)) for arm in present)] for at in places])


def shown(cell: Cell) -> str:
    """The cell as a reader sees it."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, dict):
        return f"{cell['value']:.0%} ({cell['hits']} of {cell['n']})" if cell["n"] else ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def hint(cell: Cell) -> str:
    """What stands behind a rate."""
    return f"between {cell['low']:.0%} and {cell['high']:.0%} (95 %)" if isinstance(cell, dict) and cell["n"] else ""


def key(cell: Cell) -> float | str:
    """What a column is sorted by."""
    if isinstance(cell, dict):
        return cell["value"] if cell["n"] else -1.0
    return "" if cell is None else cell


def markdown(table: Table) -> str:
    """The table in Markdown."""
    rows = [[shown(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    lines = [table.columns, ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(table: Table) -> str:
    """The table as CSV, a rate in five columns: its value, both ends of the interval, hits and n."""
    rates = [n for n in range(len(table.columns)) if any(isinstance(row[n], dict) for row in table.rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = ("value", "low", "high", "hits", "n")
    writer.writerow(
        title for n, name in enumerate(table.columns)
        for title in ([name, *(f"{name} {part}" for part in parts[1:])] if n in rates else [name])
    )  # fmt: skip
    for row in table.rows:
        writer.writerow(
            value for n, cell in enumerate(row)
            for value in ([(cell or {}).get(part) for part in parts] if n in rates else [cell])
        )  # fmt: skip
    return out.getvalue()
