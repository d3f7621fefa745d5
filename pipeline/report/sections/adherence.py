"""The sections about adherence: turns, recall, survival, kinds, unseen instructions, changes."""

from __future__ import annotations

from dataclasses import replace

from pipeline.evaluation.suites import PAPER_RECALL
from pipeline.gatt.rollout import RECALL_TURNS
from pipeline.report.figures import change_curve, survival_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.tables import (
    Cell,
    Table,
    by_arm,
    overview,
)

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
    baked = scores.fidelity and scores.fidelity.baked
    if (unchecked := scores.unchecked) and not baked:
        names = ", ".join(f"“{name}”" for name in unchecked[:_NAMED])
        more = f" and {len(unchecked) - _NAMED} more" if len(unchecked) > _NAMED else ""
        notes.append(
            f"Adherence to {len(unchecked)} of the instructions is not measured, because nothing "
            f"checks them: {names}{more}. They are in the reminder fidelity. Add checks, or name a "
            "judge (evaluate.judge)."
        )
    ceiling = " Ceiling: the base, reminded every turn." if "ceiling" in results.arms else ""
    return ReportSection(
        title="Over several turns",
        caption=f"Strict: a reply counts if it obeys and is a valid answer.{ceiling}",
        tables=[overview(scores, results.arms)],
        notes=notes,
    )


def recall(results: RunResults) -> ReportSection | None:
    """Return recall of attributes by turn, next to the paper's figures."""
    scores = results.scores
    if not scores.recall:
        return None
    ours = by_arm("recall", "turn", scores.recall, results.arms)
    paper = {
        turn: [f"{share:.0%}" for share in shares]
        for turn, shares in zip(RECALL_TURNS, zip(*PAPER_RECALL.values(), strict=True), strict=True)
    }
    if scores.fidelity and scores.fidelity.baked:
        return ReportSection(
            title="Recall",
            caption="Asked for its name, does the model give that of the prompt?",
            tables=[ours],
        )
    not_in_paper = [None] * len(PAPER_RECALL)
    rows: list[list[Cell]] = [
        [turn, *rates, *(paper.get(turn, not_in_paper) if isinstance(turn, int) else not_in_paper)]
        for turn, *rates in ours.rows
    ]
    columns = [*ours.columns, *(f"paper, {name}" for name in PAPER_RECALL)]
    return ReportSection(
        title="Recall",
        caption=(
            "Message 1 gives a name, a hobby and a further attribute. Later turns ask for them, in "
            "branches that the dialogue does not continue. Values and wordings are not those of "
            "training. By turn: name and hobby. The last columns are the paper's figures (Llama 2, "
            "Table 30, judged by people)."
        ),
        tables=[
            Table("recall", columns, rows),
            by_arm("recall_by_attribute", "attribute", scores.recall_by_attribute, results.arms),
        ],
    )


def first_broken_answer(results: RunResults) -> ReportSection | None:
    """Return how many turns dialogues last without a broken answer."""
    survival, turns = results.scores.survival, results.scores.turns
    if not survival:
        return None
    rows = [[arm, survival[arm].median or f"not by turn {turns}"] for arm in results.arms]
    return ReportSection(
        title="How long until the first broken answer",
        caption="Kaplan–Meier: the share of dialogues without a broken answer so far.",
        tables=[Table("survival", ["model", "half of the dialogues are broken by turn"], rows)],
        picture=survival_curve({arm: survival[arm] for arm in results.plotted_arms}, turns),
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
        title="By kind", caption="Instructions of training, all turns.", tables=tables
    )


def generalization(results: RunResults) -> ReportSection | None:
    """Return adherence to instructions that were not trained, and to two at once."""
    scores = results.scores
    if not scores.generalization:
        return None
    rows = [replace(row, at=f"{row.at} ({row.group})") for row in scores.by_unseen]
    return ReportSection(
        title="Instructions that were not trained",
        caption=(
            "Values that share no word with those of training, kinds that are new altogether, and "
            "two instructions at once."
        ),
        tables=[
            by_arm("generalization", "", [*scores.generalization, *scores.combined], results.arms),
            by_arm("by_unseen", "kind", rows, results.arms),
        ],
    )


def change(results: RunResults) -> ReportSection | None:
    """Return adherence before and after the user changes, ends or contradicts the instruction."""
    scores, plotted = results.scores, results.plotted_arms
    if not scores.change:
        return None
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
        for arm, changed in scores.change.items()
    ]
    tables = [Table("change", columns, rows)]
    for name, event, by_arm_name in (
        ("stop", "the user ends it", scores.stop),
        ("contradiction", "the user contradicts the system message", scores.contradiction),
    ):
        if by_arm_name:
            cells: list[list[Cell]] = [
                [arm, row.before, row.after] for arm, row in by_arm_name.items()
            ]
            tables.append(Table(name, ["", f"before {event}", "after it"], cells))
    return ReportSection(
        title="When the instruction changes",
        caption=(
            "At the dotted line the user says “From now on: …”. From there the new instruction "
            "holds, and the old one no longer. An instruction that the user ends should no longer "
            "show. One of the system message holds, whatever the user says."
        ),
        tables=tables,
        picture=change_curve(
            {arm: row for arm, row in scores.change.items() if arm in plotted}, plotted
        ),
    )


def single_turn(results: RunResults) -> ReportSection | None:
    """Return adherence in one turn, as in IFEval."""
    scores = results.scores
    if not scores.single:
        return None
    return ReportSection(
        title="One question, one instruction",
        caption=(
            "Every kind of instruction once, given with the question, as in IFEval: what did "
            "training damage?"
        ),
        tables=[
            by_arm("single", "", scores.single, results.arms),
            by_arm("single_by_kind", "kind", scores.single_by_kind, results.arms),
        ],
    )
