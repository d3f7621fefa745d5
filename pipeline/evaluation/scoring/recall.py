"""Recall: answers to questions about attributes that turn 1 has set (Table 30 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.evaluation.rates import adherence
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.scoring.rows import rate_rows
from pipeline.evaluation.suites import PAPER_ATTRIBUTES
from pipeline.records import Reply


def with_recall(scores: Scores, answers: Sequence[Reply]) -> Scores:
    """Return the scores with those of the answers to recall questions.

    What an arm knows is what it answers in turn 1, where the question stands next to the attribute.
    """
    of_paper = [r for r in answers if r.recall_attribute in PAPER_ATTRIBUTES]
    known = {_attribute_key(r) for r in of_paper if r.turn == 1 and r.adherent}
    later = [r for r in answers if r.turn > 1]
    of_known = [r for r in later if _attribute_key(r) in known]
    return replace(
        scores,
        recall=rate_rows(adherence(of_paper, lambda r: (r.arm, r.turn))),
        recall_known=rate_rows(adherence(of_known, lambda r: (r.arm, r.turn))),
        recall_by_attribute=rate_rows(adherence(later, lambda r: (r.arm, r.recall_attribute))),
    )


def _attribute_key(reply: Reply) -> tuple[str, str, str]:
    return reply.arm, reply.dialogue, reply.recall_attribute
