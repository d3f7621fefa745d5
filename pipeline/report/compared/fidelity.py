"""Reminder fidelity of compared runs, pooled over their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.evaluation.scores import FidelityRow
from pipeline.report.compared.runs import ComparedRun
from pipeline.report.tables import Cell, Table, fidelity_interval


def overall_fidelity(name: str, runs: Sequence[ComparedRun], arm: str) -> FidelityRow | None:
    """Return the fidelity of an arm over all turns of all runs; None where it is not measured."""
    rows = [
        row
        for run in runs
        if run.scores.fidelity
        for row in run.scores.fidelity.overall
        if row.arm == arm
    ]
    return pooled_fidelity(name, rows) if rows else None


def fidelity_by_turn(name: str, runs: Sequence[ComparedRun], arm: str) -> list[FidelityRow]:
    """Return the fidelity of an arm by turn."""
    by_turn: dict[int, list[FidelityRow]] = {}
    for run in runs:
        for row in run.scores.fidelity.by_turn if run.scores.fidelity else ():
            if row.arm == arm:
                by_turn.setdefault(int(row.at), []).append(row)
    return [pooled_fidelity(name, rows) for _, rows in sorted(by_turn.items())]


def pooled_fidelity(name: str, rows: Sequence[FidelityRow]) -> FidelityRow:
    """Return the fidelity over the answers of all `rows`, which are of different dialogues.

    It is the mean of their values, weighted by the base's divergence. Its interval combines theirs
    by the method of variance estimates recovery (MOVER, Zou & Donner 2008).
    """
    if len(rows) == 1:
        return replace(rows[0], arm=name)
    tokens = sum(row.tokens for row in rows)
    base = sum(row.base_kl * row.tokens for row in rows)
    kl = sum(row.kl * row.tokens for row in rows)
    value = 1 - kl / base if base > 0 else math.nan
    # Without a divergence of the base there is no interval either.
    shares = [row.base_kl * row.tokens / base if base > 0 else math.nan for row in rows]
    below, above = (
        math.hypot(
            *(share * (row.value - end) for share, row, end in zip(shares, rows, ends, strict=True))
        )
        for ends in ([row.low for row in rows], [row.high for row in rows])
    )
    return FidelityRow(
        arm=name,
        at=rows[0].at,
        kl=kl / tokens,
        base_kl=base / tokens,
        value=value,
        low=value - below,
        high=value + above,
        tokens=tokens,
        dialogues=sum(row.dialogues for row in rows),
    )


def fidelity_rows_table(rows: Sequence[FidelityRow]) -> Table:
    """Return a row for each turn and run; the base of each run is its own."""
    columns = [
        *("turn", "run", "base: nats per token", "nats per token", "fidelity", "95 % interval")
    ]
    cells: list[list[Cell]] = [
        [row.at, row.arm, row.base_kl, row.kl, fidelity_text(row), fidelity_interval(row)]
        for row in sorted(rows, key=lambda row: int(row.at))
    ]
    return Table("compare_fidelity", columns, cells)


def fidelity_text(row: FidelityRow) -> str | None:
    """Return the fidelity as "62%"; None where it is not determined."""
    return None if math.isnan(row.value) else f"{row.value:.0%}"
