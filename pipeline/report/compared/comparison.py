"""Compare runs: which of them are one row, what differs, and whether differences mean something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation.rates import Rate, adherence, rates, wilson
from pipeline.evaluation.scores import FidelityRow, RateRow, Scores
from pipeline.evaluation.scoring.rows import rate_rows
from pipeline.evaluation.statistics import Difference, kaplan_meier, lifetimes, paired_bootstrap
from pipeline.records import Constraint, Reply
from pipeline.report.compared.fidelity import (
    fidelity_by_turn,
    fidelity_rows_table,
    fidelity_text,
    overall_fidelity,
)
from pipeline.report.compared.runs import ComparedRun
from pipeline.report.compared.task import differing_settings, suite_warnings, task_warnings
from pipeline.report.tables import Cell, Table, fidelity_interval

_MAX_NAME_LENGTH = 32
"""Characters of a name that the chart has room for."""
_RESERVED_NAMES = ("base", "tuned", "ceiling")
"""Names with a meaning of their own in the chart."""


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One arm of runs that differ only in their seed; `format_name` is its exported format."""

    name: str
    runs: Sequence[ComparedRun]
    arm: str
    format_name: str

    @property
    def replies(self) -> list[Reply]:
        """Return the replies of all seeds."""
        return [reply for run in self.runs for reply in run.replies if reply.arm == self.arm]

    @property
    def last_five(self) -> list[Reply]:
        """Return the replies of all seeds in the last five turns."""
        return [reply for run in self.runs for reply in run.last_five(self.arm)]

    @property
    def adherence(self) -> Rate:
        """Return adherence in the last five turns, over all seeds."""
        return _pooled_rate(self.last_five)

    @property
    def fidelity(self) -> FidelityRow | None:
        """Return the reminder fidelity over all turns and seeds."""
        return overall_fidelity(self.name, self.runs, self.arm)

    @property
    def fidelity_by_turn(self) -> list[FidelityRow]:
        """Return the reminder fidelity by turn, over all seeds."""
        return fidelity_by_turn(self.name, self.runs, self.arm)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows, their tables, and why some of the numbers cannot be compared.

    `fidelity` is the table of reminder fidelity by turn.
    """

    rows: Sequence[ComparedRow]
    table: Table
    fidelity: Table
    warnings: Sequence[str]


def compare_runs(runs: Sequence[ComparedRun]) -> Comparison:
    """Compare runs; differences are only computed if all were evaluated on the same task."""
    different, other_task = differing_settings(runs), task_warnings(runs)
    rows = list(_rows(runs, different))
    warnings = [
        *other_task,
        *suite_warnings(runs),
        *_seed_warnings(rows, paired=not other_task),
    ]
    table = _table(rows, different, paired=not other_task)
    fidelity = fidelity_rows_table([turn for row in rows for turn in row.fidelity_by_turn])
    return Comparison(rows, table, fidelity, warnings)


def curve_rows(name: str, replies: Sequence[Reply]) -> list[RateRow]:
    """Return adherence by turn, for the chart."""
    by_turn = adherence(sorted(replies, key=lambda r: r.turn), lambda r: r.turn)
    return list(rate_rows({(name, turn): rate for turn, rate in by_turn.items()}))


def _rows(runs: Sequence[ComparedRun], different: Sequence[str]) -> Iterator[ComparedRow]:
    """Yield a row for each measured format of runs that differ only in their seed.

    A second run with the same recipe and seed is a row of its own.
    """
    groups: dict[tuple[str, int], list[ComparedRun]] = {}
    repeats: Counter[tuple[str, int]] = Counter()
    for run in runs:
        values = repr([run.settings[key] for key in different])
        repeats[values, run.recipe.seed] += 1
        groups.setdefault((values, repeats[values, run.recipe.seed]), []).append(run)
    names = _row_names([group[0] for group in groups.values()], different)
    for name, group in zip(names, groups.values(), strict=True):
        recipe = group[0].recipe
        # With evaluate.adapter, an adapter was measured in place of the exported files.
        formats = ("",) if recipe.evaluate.adapter else recipe.export.formats
        for format_name in formats:
            row = ComparedRow(
                f"{name}, {format_name}" if len(formats) > 1 else name,
                group,
                "tuned" if format_name == formats[0] else f"tuned, {format_name}",
                format_name,
            )
            if row.adherence.n or row.fidelity:
                yield row


def _row_names(runs: Sequence[ComparedRun], different: Sequence[str]) -> list[str]:
    """Return the differing settings if they are short and distinct, else folder names or paths."""
    names = [
        ", ".join(f"{key.rpartition('.')[2]} {run.settings[key]}" for key in different)
        for run in runs
    ]
    if all(0 < len(name) <= _MAX_NAME_LENGTH for name in names) and len(set(names)) == len(names):
        return names
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    return [f"run {name}" if name in _RESERVED_NAMES else name for name in names]


def _seed_warnings(rows: Sequence[ComparedRow], *, paired: bool) -> list[str]:
    """Return a warning if rows have different seeds: each seed holds out its own dialogues."""
    if len({frozenset(run.recipe.seed for run in row.runs) for row in rows}) == 1:
        return []
    warning = "Not all rows have the same seeds, and each seed has its own dialogues"
    return [f"{warning}: differences are over common seeds only." if paired else f"{warning}."]


def _table(rows: Sequence[ComparedRow], different: Sequence[str], *, paired: bool) -> Table:
    """Return the table of all rows; columns without a number are left out."""
    columns: dict[str, list[Cell]] = {
        "run": [row.name for row in rows],
        "last five turns": [row.adherence if row.adherence.n else None for row in rows],
    }
    if any(len(row.runs) > 1 for row in rows):
        columns["seeds"] = [len(row.runs) for row in rows]
        columns["lowest and highest seed"] = [_seed_range(row) for row in rows]
    columns |= {key: [_short(row.runs[0].settings[key]) for row in rows] for key in different}
    if paired:
        columns |= _difference_columns(rows)
    columns |= {
        "all turns but the first": [
            _measured_rate([r for r in row.replies if r.turn > 1]) for row in rows
        ],
        "obeys, valid answer or not": [
            _measured_rate(row.last_five, lambda reply: bool(reply.obeys)) for row in rows
        ],
        "half broken by turn": [_half_broken(row) for row in rows],
        **_fidelity_columns(rows),
        "recall, last probe": [_recall(row) for row in rows],
        "leakage": [
            _from_scores(row, lambda scores: scores.leaks.new if scores.leaks else ())
            for row in rows
        ],
        "perplexity, % above the base": [_perplexity_increase(row) for row in rows],
        "MB": [_megabytes(row) for row in rows],
        "training, s": [_training_seconds(row) for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    return Table("compare", list(filled), list(zip(*filled.values(), strict=True)))


def _half_broken(row: ComparedRow) -> Cell:
    lives = lifetimes(row.replies).values()
    return (kaplan_meier(lives).median or "never") if lives else None


def _fidelity_columns(rows: Sequence[ComparedRow]) -> dict[str, list[Cell]]:
    fidelity = [row.fidelity for row in rows]
    return {
        "reminder fidelity": [fidelity_text(f) if f else None for f in fidelity],
        "fidelity between (95 %)": [
            (fidelity_interval(f) or None) if f else None for f in fidelity
        ],
    }


def _difference_columns(rows: Sequence[ComparedRow]) -> dict[str, list[Cell]]:
    differences = [None, *(_difference(rows[0], row) for row in rows[1:])]
    return {
        "difference, points": [round(100 * d.difference, 1) if d else None for d in differences],
        "difference between (95 %)": [
            f"{100 * d.low:+.0f} to {100 * d.high:+.0f}" if d else None for d in differences
        ],
    }


def _difference(first: ComparedRow, row: ComparedRow) -> Difference | None:
    """Return the difference from the first row over common dialogues, None if there are none."""
    difference = paired_bootstrap(first.last_five, row.last_five)
    return difference if difference.dialogues else None


def _pooled_rate(
    replies: Sequence[Reply], is_hit: Callable[[Reply], bool] = lambda reply: reply.adherent
) -> Rate:
    return rates(replies, lambda reply: "", is_hit).get("") or wilson(0, 0)


def _measured_rate(
    replies: Sequence[Reply], is_hit: Callable[[Reply], bool] = lambda reply: reply.adherent
) -> Rate | None:
    rate = _pooled_rate(replies, is_hit)
    return rate if rate.n else None


def _seed_range(row: ComparedRow) -> str | None:
    if len(row.runs) == 1 or not row.adherence.n:
        return None
    values = [_pooled_rate(run.last_five(row.arm)).value for run in row.runs]
    return f"{min(values):.0%} to {max(values):.0%}"


def _from_scores(row: ComparedRow, select: Callable[[Scores], Sequence[RateRow]]) -> Rate | None:
    """Return a rate of the scores, pooled over all seeds."""
    selected = [rate for run in row.runs for rate in select(run.scores) if rate.arm == row.arm]
    if not selected:
        return None
    return wilson(sum(rate.hits for rate in selected), sum(rate.n for rate in selected))


def _recall(row: ComparedRow) -> Rate | None:
    turns = [int(rate.at) for run in row.runs for rate in run.scores.recall]
    if not turns:
        return None
    return _from_scores(row, lambda scores: [r for r in scores.recall if r.at == max(turns)])


def _perplexity_increase(row: ComparedRow) -> float | None:
    increases = [
        run.scores.degradation.perplexity[row.arm] / run.scores.degradation.perplexity["base"] - 1
        for run in row.runs
        if run.scores.degradation and row.arm in run.scores.degradation.perplexity
    ]
    return round(100 * sum(increases) / len(increases), 1) if increases else None


def _megabytes(row: ComparedRow) -> int | None:
    size = row.runs[0].file_bytes.get(row.format_name)
    return None if size is None else round(size / 1e6)


def _training_seconds(row: ComparedRow) -> int | None:
    seconds = [run.training_seconds for run in row.runs if run.training_seconds is not None]
    return round(sum(seconds) / len(seconds)) if seconds else None


def _short(value: object) -> str:
    """Return a setting for a cell: constraints by name, a long text by its beginning and end."""
    if isinstance(value, list):
        value = ", ".join(
            _entry_name(item) if isinstance(item, dict) else str(item) for item in value
        )
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def _entry_name(entry: dict[str, str]) -> str:
    """Return the name of an entry of the pool: a constraint, or an instruction with a text."""
    return entry["text"] if "text" in entry else Constraint(**entry).name
