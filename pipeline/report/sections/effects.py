"""The sections about what else training did: fidelity, leakage, damage, the judge, attention."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.fidelity import WITH_PROMPT
from pipeline.evaluation.scores import Fidelity, FidelityRow, Leakage
from pipeline.report.facts import public_name
from pipeline.report.figures import attention_figure, fidelity_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.tables import (
    Cell,
    Table,
    by_arm,
    fidelity_interval,
    fidelity_table,
    format_cell,
    points_text,
)


def leakage_and_damage(results: RunResults) -> ReportSection | None:
    """Return trained traits and perplexity in dialogues without an instruction."""
    scores = results.scores
    baked = scores.is_baked
    leaks = scores.leaks
    if not leaks and not scores.degradation:
        return None
    tables = _leakage_tables(leaks, results.arms) if leaks else []
    notes = _leakage_notes(leaks) if leaks else []
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
            else "Dialogues without an instruction: what was trained should not show, and the "
            "model should answer as before. What the base does unasked is no leakage. A trait is "
            "an instruction with its trained value, or the form of its kind with any value: a "
            "signature, a hashtag, a heading, a JSON object, a figure named first."
        ),
        tables=tables,
        notes=notes,
    )


def _leakage_tables(leaks: Leakage, arms: Sequence[str]) -> list[Table]:
    """Return how often traits show that the base never shows, and differences by trait."""
    tables = []
    if leaks.new:
        shows = "a trained trait shows that the base never shows, in"
        tables.append(by_arm("leakage", shows, leaks.new, arms))
    if leaks.by_trait:
        others = [arm for arm in arms if any(row.arm == arm != "base" for row in leaks.by_trait)]
        columns = ["trained trait", "base"]
        for arm in others:
            columns += [arm, f"{arm}: points from the base"]
        cells = {(row.at, row.arm): row for row in leaks.by_trait}
        rows: list[list[Cell]] = []
        for trait in dict.fromkeys(row.at for row in leaks.by_trait):
            pairs = [cells.get((trait, arm)) for arm in others]
            with_points = [
                cell for row in pairs for cell in (row, row and points_text(row.difference))
            ]
            rows.append([trait, cells.get((trait, "base")), *with_points])
        tables.append(Table("leakage_by_trait", columns, rows))
    return tables


def _leakage_notes(leaks: Leakage) -> list[str]:
    """Return what was counted, and of how many traits."""
    listed = len({row.at for row in leaks.by_trait})
    notes = [
        f"Of {leaks.traits} trained traits the base never shows {leaks.never_in_base} unasked in "
        "these dialogues. The others do not count in that share: each is compared with the base."
    ]
    if listed:
        alike = leaks.traits - listed
        others = f" All models show the other {alike} equally often." if alike else ""
        notes.append(f"In brackets: 95 % intervals (paired bootstrap over dialogues).{others}")
    else:
        notes.append("All models show each of them equally often.")
    return notes


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
            *map(_leak_note, fidelity.leaks),
            "What else has changed under another system message is in the section on damage.",
        ]
        if not results.scores.by_turn:
            notes.append(
                "No sentence of the prompt is worded as a check, and no judge was named, so there "
                "is no adherence."
            )
        if fidelity.leaks:
            tables.append(fidelity_table("baked_leakage", "", fidelity.leaks))
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
        picture=fidelity_curve(
            [
                row
                for row in fidelity.by_turn
                if row.arm.removesuffix(WITH_PROMPT) in results.plotted_arms
            ]
        ),
        notes=notes,
    )


def _leak_note(row: FidelityRow) -> str:
    """Return whether a baked prompt shows under another system message."""
    interval = fidelity_interval(row)
    counts = f"{f'95 % interval {interval}, ' if interval else ''}{row.dialogues} dialogues"
    if not row.value > 0:
        return (
            f"Leakage: under another system message, {row.arm} is no nearer to the base with the "
            f"prompt than the base is ({counts}): the prompt does not show there."
        )
    return (
        f"Leakage: under another system message, {row.arm} is {row.value:.0%} nearer to the base "
        f"with the prompt than the base is ({counts}); 0% would be none."
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


def judge(results: RunResults) -> ReportSection | None:
    """Return the verdicts of a judge, and how often it agrees with exact checks."""
    judgment = results.scores.judge
    if not judgment:
        return None
    tables = (
        [by_arm("judge", "instruction", judgment.scores, results.arms)] if judgment.scores else []
    )
    if judgment.agreement.n:
        agreed = format_cell(judgment.agreement)
        calibration = f"Where a program can, it agreed in {agreed} of the replies."
        notes = [] if judgment.reliable else ["Below 80 %: its verdicts are not reliable."]
    else:
        calibration = "How far it can be trusted is not known."
        notes = [
            "That takes replies that a program can check, some that obey and some that do not."
        ]
    return ReportSection(
        title="The judge",
        caption=f"{public_name(judgment.model)} judged what no program can check. {calibration}",
        tables=tables,
        notes=notes,
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
