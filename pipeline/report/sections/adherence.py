"""The sections about adherence: turns, survival, kinds, unseen instructions, changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

from pipeline.evaluation.rates import wilson
from pipeline.evaluation.scores import ChangeScores, EventScores, RateRow, Scores
from pipeline.gatt.acceptance import Acceptance
from pipeline.gatt.constraints.registry import KINDS
from pipeline.report.figures import change_curve, survival_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.tables import (
    Cell,
    Table,
    by_arm,
    conditions_table,
    overview,
)

T = TypeVar("T")

_OFTEN = 0.2
"""Share of a kind's replies from which a note names it."""
_NAMED = 8
"""Instructions that a note names."""


def several_turns(results: RunResults) -> ReportSection:
    """Return adherence over several turns, and the differences from the base."""
    scores = results.scores
    notes = [
        f"{arm}: {100 * d.difference:+.0f} points from the base, 95 % interval "
        f"{100 * d.low:+.0f} to {100 * d.high:+.0f} (paired bootstrap, {d.dialogues} dialogues)."
        for arm, d in scores.difference.items()
        if d.dialogues
    ]
    if size := scores.required_sample_size:
        notes.append(
            f"To detect a difference of 5 points from this rate, {size.dialogues} dialogues per "
            "model are needed."
        )
    if (unchecked := scores.unchecked) and not scores.is_baked:
        names = ", ".join(f"“{name}”" for name in unchecked[:_NAMED])
        more = f" and {len(unchecked) - _NAMED} more" if len(unchecked) > _NAMED else ""
        notes.append(
            f"Adherence to {len(unchecked)} of the instructions is not measured, because nothing "
            f"checks them: {names}{more}. They are in the reminder fidelity. Add checks, or name a "
            "judge (evaluate.judge)."
        )
    with_instruction = "with the prompt" if scores.is_baked else "reminded every turn"
    ceiling = f" Ceiling: the base, {with_instruction}." if "ceiling" in results.arms else ""
    tables = [overview(scores, results.arms)]
    lengths = sorted(scores.by_length, key=lambda row: int(row.at))
    if len({row.at for row in lengths}) > 1:
        tables.append(by_arm("by_length", "tokens of the prompt, up to", lengths, results.arms))
        notes.append(
            "By tokens: all turns but the first. Training dialogues have up to "
            f"{results.recipe.train.max_length} (train.max_length)."
        )
    return ReportSection(
        title="Over several turns",
        caption=f"Strict: a reply counts if it obeys and is a valid answer.{ceiling}",
        tables=tables,
        notes=notes,
    )


def other_conditions(results: RunResults) -> ReportSection | None:
    """Return adherence with other samplers and in longer dialogues."""
    if not results.conditions:
        return None
    return ReportSection(
        title="Other samplers and lengths",
        caption=(
            "The same dialogues once more, with the sampler of other programs or with more turns. "
            "Strict adherence in five turns, next to that of the evaluation in its last five."
        ),
        tables=[conditions_table(results.conditions)],
        notes=["In brackets: 95 % intervals (paired bootstrap over dialogues)."],
    )


def first_broken_answer(results: RunResults) -> ReportSection | None:
    """Return how many turns dialogues last without a broken answer."""
    scores = results.scores
    survival, turns = scores.survival, scores.turns
    if not survival:
        return None
    rows = [[arm, survival[arm].median or f"not by turn {turns}"] for arm in results.arms]
    plotted = {arm: survival[arm] for arm in results.plotted_arms}
    return ReportSection(
        title="How long until the first broken answer",
        caption="Kaplan–Meier: the share of dialogues without a broken answer so far.",
        tables=[Table("survival", ["model", "half of the dialogues are broken by turn"], rows)],
        picture=survival_curve(plotted, turns, baked=scores.is_baked),
    )


def by_instruction(results: RunResults) -> ReportSection | None:
    """Return adherence by trained instruction and by family."""
    scores = results.scores
    if not scores.by_instruction:
        return None
    tables = [by_arm("by_instruction", "kind", scores.by_instruction, results.arms)]
    if scores.by_family:
        tables.append(by_arm("by_family", "family", scores.by_family, results.arms))
    return ReportSection(
        title="By kind",
        caption="Instructions of training, all turns.",
        tables=tables,
        notes=[
            *_not_accepted(results.acceptance),
            *_not_measured(scores.coverage),
            *_often(
                scores.obey_no_answer,
                "Obeyed, and no valid answer (a loop, a repeat, or nothing but what was asked for)",
            ),
            *_often(
                scores.cut_before_obeying,
                "Cut at the maximum length before they obeyed; raise evaluate.max_tokens",
            ),
        ],
    )


def _often(rows: Sequence[RateRow], meaning: str) -> list[str]:
    """Return a note of the kinds that lose many replies in one way."""
    many: dict[int | str, list[str]] = {}
    for row in rows:
        if row.value >= _OFTEN:
            many.setdefault(row.at, []).append(f"{row.arm} {row.hits} of {row.n}")
    kinds = "; ".join(f"{kind}: {', '.join(counts)}" for kind, counts in many.items())
    return [f"{meaning}: {kinds}."] if kinds else []


def _not_accepted(acceptance: Acceptance | None) -> list[str]:
    """Return a note of the kinds that training lacks, as no answer of the teacher followed them."""
    accepted: Counter[str] = Counter()
    for row in acceptance.rows if acceptance else ():
        if row.kind in KINDS:
            accepted[row.kind] += row.accepted
    kinds = [kind for kind, count in accepted.items() if not count]
    if not kinds:
        return []
    return [
        f"No answer of the teacher that follows one of these alone was accepted, so they were "
        f"hardly trained: {', '.join(kinds)}."
    ]


def _not_measured(coverage: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a note about the trained constraints that no evaluation dialogue has."""
    measured, trained = (sum(row[n] for row in coverage.values()) for n in (0, 1))
    if measured == trained:
        return []
    kinds = [kind for kind, (count, _) in coverage.items() if not count]
    of_kinds = f"; nothing of the kinds {', '.join(kinds)}" if kinds else ""
    return [
        f"Measured: {measured} of the {trained} trained constraints, of "
        f"{len(coverage) - len(kinds)} of {len(coverage)} kinds{of_kinds}. Raise "
        "evaluate.dialogues to measure more."
    ]


def generalization(results: RunResults) -> ReportSection | None:
    """Return adherence to instructions that were not trained, and to trained ones at once."""
    scores = results.scores
    rates = [*scores.generalization, *_late_unseen(scores), *scores.combined]
    if not rates:
        return None
    rows = [replace(row, at=f"{row.at} ({row.group})") for row in scores.by_unseen]
    return ReportSection(
        title="New values, new kinds, several at once",
        caption=(
            "Values that share no word with those of training, kinds that are new altogether, and "
            "two or three trained instructions at once, which count if all are kept."
        ),
        tables=[
            by_arm("generalization", "", rates, results.arms),
            by_arm("by_unseen", "kind", rows, results.arms),
        ],
    )


def _late_unseen(scores: Scores) -> list[RateRow]:
    """Return the rates in the last five turns, of what was not trained and is measured so long."""
    first = scores.turns - 4
    if first <= 1:
        return []
    ends = {row.group for row in scores.unseen_by_turn if row.at == scores.turns}
    late = [row for row in scores.unseen_by_turn if row.group in ends and int(row.at) >= first]
    hits, counts = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in late:
        hits[row.group, row.arm] += row.hits
        counts[row.group, row.arm] += row.n
    return [
        RateRow(
            arm=arm,
            at=f"{group}, turns {first} to {scores.turns}",
            **asdict(wilson(hits[group, arm], n)),
        )
        for (group, arm), n in counts.items()
    ]


def change(results: RunResults) -> ReportSection | None:
    """Return adherence before and after the user changes, ends or contradicts the instruction."""
    scores, plotted, custom = results.scores, results.plotted_arms, results.scores.custom_events
    tables = [
        _change_table([*scores.change.items(), *_own_words(custom.change)]),
        _event_table("stop", "the user ends it", [*scores.stop.items(), *_own_words(custom.stop)]),
        _event_table(
            "contradiction",
            "the user contradicts the system message",
            [*scores.contradiction.items(), *_own_words(custom.contradiction)],
        ),
    ]
    if not any(table.rows for table in tables):
        return None
    changes = {arm: row for arm, row in scores.change.items() if arm in plotted}
    return ReportSection(
        title="When the instruction changes",
        caption=(
            "At the dotted line the user says “From now on: …”. From there the new instruction "
            "holds, and the old one no longer. An instruction that the user ends should no longer "
            "show. One of the system message holds, whatever the user says."
        ),
        tables=[table for table in tables if table.rows],
        picture=change_curve(changes, plotted) if changes else None,
    )


def _own_words(by_arm: Mapping[str, T]) -> list[tuple[str, T]]:
    """Return the rows of the instructions in the user's own words alone."""
    return [(f"{arm}: in your own words only", scores) for arm, scores in by_arm.items()]


def _change_table(changes: Sequence[tuple[str, ChangeScores]]) -> Table:
    columns = [
        "",
        "old one, before the change",
        "new one, after it",
        "old one, after it",
        "turns to switch (median)",
        "never switched",
    ]
    rows: list[list[Cell]] = [
        [
            arm,
            changed.before,
            changed.after,
            changed.old_after,
            "never" if changed.turns_to_switch is None else changed.turns_to_switch,
            f"{changed.never_switched} of {changed.dialogues}",
        ]
        for arm, changed in changes
    ]
    return Table("change", columns, rows)


def _event_table(name: str, event: str, rows: Sequence[tuple[str, EventScores]]) -> Table:
    cells: list[list[Cell]] = [[arm, row.before, row.after] for arm, row in rows]
    return Table(name, ["", f"before {event}", "after it"], cells)


def single_turn(results: RunResults) -> ReportSection | None:
    """Return adherence in one turn, as in IFEval."""
    scores = results.scores
    if not scores.single:
        return None
    kinds = len({row.at for row in scores.single_by_kind})
    return ReportSection(
        title="One question, one instruction",
        caption=(
            f"{kinds} kinds of instructions, each given once with a question, as in IFEval: what "
            "did training damage?"
        ),
        tables=[
            by_arm("single", "", scores.single, results.arms),
            by_arm("single_by_kind", "kind", scores.single_by_kind, results.arms),
        ],
    )
