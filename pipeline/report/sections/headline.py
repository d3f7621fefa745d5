"""The sentence that opens a report."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.scores import RateRow, Scores
from pipeline.report.sections.effects import fidelity_note


def headline(scores: Scores) -> str:
    """Return the sentence that opens the report, about the figure that the recipe chose."""
    if scores.primary == "recall" and scores.recall:
        last = max(int(row.at) for row in scores.recall)
        rows = [row for row in scores.recall if row.at == last]
        what = "gives the prompt's name" if scores.is_baked else "recalls what turn 1 says"
        return (
            f"Asked in turn {last}, the tuned model {what} in {_share(rows, 'tuned')} of the "
            f"answers, the base in {_share(rows, 'base')}."
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
        notes = [] if scores.is_baked else ["No instruction has a check."]
        if fidelity:
            tuned = [row for row in fidelity.overall if row.arm == "tuned"]
            notes += [fidelity_note(row, fidelity) for row in tuned]
        return " ".join(notes)
    if scores.is_baked:
        return (
            f"{missing}In {rows[0].at}, the tuned model follows the prompt without being given it "
            f"in {_share(rows, 'tuned')} of the answers, the base in {_share(rows, 'base')}."
        )
    return (
        f"{missing}In {rows[0].at}, the tuned model keeps its instruction in "
        f"{_share(rows, 'tuned')} of the answers, the base in {_share(rows, 'base')}."
    )


def _share(rows: Sequence[RateRow], arm: str) -> str:
    n = sum(row.n for row in rows if row.arm == arm)
    hits = sum(row.hits for row in rows if row.arm == arm)
    return f"{hits / n:.0%}" if n else "an unknown share"
