"""The sections of a report about what evaluation measured.

Each function returns its section, or None where nothing was measured for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.evaluation.fidelity import WITH_PROMPT
from pipeline.evaluation.scores import Fidelity, FidelityRow, RateRow, Scores
from pipeline.evaluation.suites import PAPER_RECALL
from pipeline.gatt.rollout import RECALL_TURNS
from pipeline.report.facts import public_name
from pipeline.report.figures import attention_figure, change_curve, survival_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.tables import (
    Cell,
    Table,
    by_arm,
    fidelity_interval,
    fidelity_table,
    format_cell,
    overview,
)

_NAMED = 8
"""Instructions that a note names."""
Section = Callable[[RunResults], ReportSection | None]


def headline(scores: Scores) -> str:
    """Return the sentence that opens the report, about the figure that the recipe chose."""
    if scores.primary == "recall" and scores.recall:
        last = max(int(row.at) for row in scores.recall)
        rows = [row for row in scores.recall if row.at == last]
        return (
            f"Asked in turn {last}, the tuned model recalls what turn 1 says in "
            f"{_share(rows, 'tuned')} of the answers, the base in {_share(rows, 'base')}."
        )
    if scores.primary == "unseen" and scores.generalization:
        rows = list(scores.generalization)
        return (
            f"The tuned model keeps instructions that were not trained in {_share(rows, 'tuned')} "
            f"of the answers, the base in {_share(rows, 'base')}."
        )
    missing = ""
    if scores.primary in ("recall", "unseen"):
        missing = f"The figure chosen to open this report ({scores.primary}) was not measured. "
    rows = list(scores.after_first if scores.primary == "after_first" else scores.last_five)
    if not rows:
        fidelity = scores.fidelity
        notes = [] if fidelity and fidelity.baked else ["No instruction has a check."]
        if fidelity:
            tuned = [row for row in fidelity.overall if row.arm == "tuned"]
            notes += [fidelity_note(row, fidelity) for row in tuned]
        return " ".join(notes)
    return (
        f"{missing}In {rows[0].at}, the tuned model keeps its instruction in "
        f"{_share(rows, 'tuned')} of the answers, the base in {_share(rows, 'base')}."
    )


def _share(rows: Sequence[RateRow], arm: str) -> str:
    n = sum(row.n for row in rows if row.arm == arm)
    hits = sum(row.hits for row in rows if row.arm == arm)
    return f"{hits / n:.0%}" if n else "an unknown share"


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


def leakage_and_damage(results: RunResults) -> ReportSection | None:
    """Return trained traits and perplexity in dialogues without an instruction."""
    scores = results.scores
    if not scores.leakage and not scores.degradation:
        return None
    baked = bool(scores.fidelity and scores.fidelity.baked)
    leakage = by_arm("leakage", "a trained trait shows in", scores.leakage, results.arms)
    tables = [leakage] if scores.leakage and not baked else []
    notes = [
        f"{arm}: {trait}, {count} times"
        for arm, traits in scores.leaked.items()
        for trait, count in traits.items()
    ]
    degradation = scores.degradation
    if degradation and degradation.perplexity:
        base = degradation.perplexity["base"]
        rows: list[list[Cell]] = [
            [arm, perplexity, f"{perplexity / base - 1:+.1%}", degradation.kl[arm]]
            for arm, perplexity in degradation.perplexity.items()
        ]
        columns = ["", "perplexity", "change from the base", "KL from the base, nats per token"]
        tables.append(Table("degradation", columns, rows))
        notes.append(
            f"Perplexity and KL are over {degradation.tokens} tokens of the base's own answers in "
            "plain dialogues."
        )
    return ReportSection(
        title="Leakage and damage",
        caption=(
            "Dialogues with another system message: the model should answer as before."
            if baked
            else "Dialogues without an instruction: no trained trait should show, and the model "
            "should answer as before."
        ),
        tables=tables,
        notes=notes,
    )


def reminder_fidelity(results: RunResults) -> ReportSection | None:
    """Return how near each model that is told once comes to the base that is always reminded.

    For a baked prompt: a model without the prompt, and the base with it.
    """
    fidelity = results.scores.fidelity
    if not fidelity or not fidelity.overall:
        return None
    dialogues = max(row.dialogues for row in fidelity.overall)
    notes = [fidelity_note(row, fidelity) for row in fidelity.overall]
    tables = [
        fidelity_table("fidelity", "", fidelity.overall),
        fidelity_table("fidelity_by_turn", "turn", fidelity.by_turn),
    ]
    if fidelity.baked:
        title, near, far = "Baked prompt", "with it", "without the prompt"
        notes += [
            f"Without the prompt, each request is {fidelity.saved_tokens:.0f} tokens shorter.",
            "No program can check a prompt, so there is no adherence. Nor is there leakage: the "
            "prompt is meant to show without being given. What has changed under another system "
            "message is in the section on damage.",
        ]
    else:
        title, near, far = "Reminder fidelity", "reminded in every turn", "told once"
        by_instruction = fidelity.by_instruction
        tables.append(fidelity_table("fidelity_by_instruction", "instruction", by_instruction))
    return ReportSection(
        title=title,
        caption=(
            f"How much nearer a model {far} comes to the base {near} than the base {far}. It needs "
            f"no check: it is the KL from the base {near}, on its own answers in {dialogues} "
            f"dialogues. 100% is a model that predicts as the base {near} does, 0% one that is no "
            "nearer to it than the base."
        ),
        tables=tables,
        notes=notes,
    )


def fidelity_note(row: FidelityRow, fidelity: Fidelity) -> str:
    """Return what the figure of one model means."""
    interval = fidelity_interval(row)
    counts = f"{f'95 % interval {interval}, ' if interval else ''}{row.dialogues} dialogues"
    near, far = "reminded in every turn", "told once"
    if fidelity.baked:
        near, far = "with it", "without the prompt"
    arm = row.arm if row.arm.endswith(WITH_PROMPT) else f"{row.arm}, {far}"
    if not row.value > 0:
        return f"{arm}: no nearer to the base {near} than the base {far} ({counts})."
    return (
        f"{arm}: {row.value:.0%} nearer to the base {near} than the base {far} is ({counts}, "
        f"{row.tokens} tokens, {row.at})."
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


def judge(results: RunResults) -> ReportSection | None:
    """Return the verdicts of a judge, and how often it agrees with exact checks."""
    judgment = results.scores.judge
    if not judgment:
        return None
    tables = (
        [by_arm("judge", "instruction", judgment.scores, results.arms)] if judgment.scores else []
    )
    return ReportSection(
        title="The judge",
        caption=(
            f"{public_name(judgment.model)} judged what no program can check. Where a program can, "
            f"it agreed in {format_cell(judgment.agreement) or 'none'} of the replies."
        ),
        tables=tables,
        notes=[] if judgment.reliable else ["Below 80 %: its verdicts are not reliable."],
    )


def attention(results: RunResults) -> ReportSection | None:
    """Return the map of what the answers of one dialogue attend to."""
    if not results.attention:
        return None
    return ReportSection(
        title="What the answers attend to",
        caption=(
            "One dialogue, each model with its own answers: the strongest attention over all heads "
            "and layers, from each answer (down) to everything before it (across), in bins of "
            "eight tokens, as in Figure 10 of the paper; and the mean share of the attention that "
            "falls on the instruction."
        ),
        picture=attention_figure(results.attention),
    )


EVALUATION_SECTIONS: Sequence[Section] = (
    several_turns,
    recall,
    first_broken_answer,
    by_instruction,
    generalization,
    change,
    reminder_fidelity,
    leakage_and_damage,
    single_turn,
    judge,
    attention,
)
