"""The section about recall: Table 30 of the paper, for the models of a run."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.evaluation.scores import RateRow
from pipeline.evaluation.suites import PAPER_RECALL
from pipeline.gatt.rollout import RECALL_TURNS
from pipeline.report.figures import recall_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults
from pipeline.report.tables import Cell, Table, by_arm

_PAPER = {
    name: dict(zip(RECALL_TURNS, shares, strict=True)) for name, shares in PAPER_RECALL.items()
}
"""The paper's shares by turn, for each of its models."""


def recall(results: RunResults) -> ReportSection | None:
    """Return recall of attributes by turn, next to the paper's figures."""
    scores = results.scores
    if not scores.recall:
        return None
    if scores.is_baked:
        return ReportSection(
            title="Recall",
            caption="Asked for its name, does the model give that of the prompt?",
            tables=[by_arm("recall", "turn", scores.recall, results.arms)],
        )
    by_attribute = by_arm(
        "recall_by_attribute", "attribute", scores.recall_by_attribute, results.arms
    )
    caption = (
        "Message 1 gives a name, a hobby and a further attribute. Later turns ask for them in "
        "several wordings, in branches that the dialogue does not continue. Values and wordings "
        "are not those of training. By turn: name and hobby. "
    )
    paper = "The last columns are the paper's figures (Llama 2, Table 30, judged by people)."
    if not scores.recall_known:
        return ReportSection(
            title="Recall",
            caption=caption + paper,
            tables=[_beside_paper("recall", scores.recall, results.arms), by_attribute],
        )
    caption += (
        "The figure and the first table are about what the same model answers in turn 1, where the "
        "question stands next to the attribute; the second table has everything. "
    )
    return ReportSection(
        title="Recall",
        caption=caption + paper,
        tables=[
            _beside_paper("recall", scores.recall_known, results.arms),
            by_arm("recall_all", "turn", scores.recall, results.arms),
            by_attribute,
        ],
        picture=recall_curve(scores.recall_known, _PAPER, results.plotted_arms),
        notes=[_known_note([row for row in scores.recall if row.at == 1])],
    )


def _beside_paper(name: str, rates: Sequence[RateRow], arms: Sequence[str]) -> Table:
    """Return a table by turn whose last columns are the paper's."""
    ours = by_arm(name, "turn", rates, arms)
    rows: list[list[Cell]] = [
        [turn, *cells, *(_paper_share(shares, turn) for shares in _PAPER.values())]
        for turn, *cells in ours.rows
    ]
    return Table(name, [*ours.columns, *(f"paper, {model}" for model in _PAPER)], rows)


def _paper_share(shares: dict[int, float], turn: Cell) -> Cell:
    share = shares.get(turn) if isinstance(turn, int) else None
    return None if share is None else f"{share:.0%}"


def _known_note(rows: Sequence[RateRow]) -> str:
    """Return how much of what it is told each arm can say in turn 1."""
    counts = ", ".join(f"{row.arm} {row.hits} of {row.n}" for row in rows)
    return f"In turn 1 they give: {counts}. The others count in the second table only."
