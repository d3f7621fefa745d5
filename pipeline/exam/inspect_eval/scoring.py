"""The scorer and the metric: the verdicts and numbers of `gatt exam`."""

from __future__ import annotations

from typing import Any

from inspect_ai.scorer import (
    NOANSWER,
    Metric,
    SampleScore,
    Score,
    Scorer,
    Target,
    Value,
    metric,
    scorer,
)
from inspect_ai.solver import TaskState

from pipeline.exam.dialogue_run import read_reply
from pipeline.exam.inspect_eval.logs import REPLIES
from pipeline.exam.inspect_eval.options import of_gatt
from pipeline.exam.result import ArmResult
from pipeline.exam.scores import score_arms
from pipeline.exam.settings import most_turns
from pipeline.exam.tasks import ExamTask, exam_tasks


def arms_in(scores: list[SampleScore]) -> list[ArmResult]:
    """Return the numbers of each arm from the replies in the scores of its dialogues."""
    rows: list[dict[str, Any]] = [
        row for score in scores for row in (score.score.metadata or {}).get(REPLIES, ())
    ]
    last = max((row["reply"]["turn"] for row in rows), default=0)
    return list(score_arms([read_reply(row) for row in rows], _all_tasks(last)))


@metric(name="gatt/numbers", scores="unreduced")
@of_gatt
def numbers() -> Metric:
    """Return the shares of kept answers, with what else the tables of `gatt exam` have."""

    def compute(scores: list[SampleScore]) -> Value:
        values: dict[str, float] = {}
        for arm in arms_in(scores):
            values |= {
                f"{arm.name}: kept": arm.adherence.value,
                f"{arm.name}: low": arm.adherence.low,
                f"{arm.name}: high": arm.adherence.high,
                f"{arm.name}: words": arm.words,
                f"{arm.name}: cut": arm.cut.value,
                f"{arm.name}: loops": arm.loops.value,
            }
            if arm.last_five.n:
                values[f"{arm.name}: last five turns"] = arm.last_five.value
            if arm.full_window.n:
                values[f"{arm.name}: context full"] = arm.full_window.value
            values |= {f"{arm.name}, {r.regime}": r.adherence.value for r in arm.regimes}
        return values

    return compute


@scorer(metrics=[numbers()], name="gatt/verdicts")
@of_gatt
def verdicts() -> Scorer:
    """Check each answer of a dialogue; the value is the share of counted answers that is kept."""

    async def score(state: TaskState, target: Target) -> Score:
        rows: list[dict[str, Any]] = state.store.get(REPLIES, [])
        if not rows:
            return Score(value=NOANSWER, explanation="There is no answer.")
        last = max(row["reply"]["turn"] for row in rows)
        (arm,) = score_arms([read_reply(row) for row in rows], _all_tasks(last))
        marks = [f"{d.attribute} {d.marks}".strip() for d in arm.dialogues]
        share = arm.adherence
        return Score(
            value=share.value if share.n else NOANSWER,
            answer=", ".join(marks),
            explanation=f"{share.hits} of {share.n} counted answers are kept ({target.text})",
            metadata={REPLIES: rows},
        )

    return score


def _all_tasks(turns: int) -> list[ExamTask]:
    """Return all dialogues of the exam, of which some were held."""
    return exam_tasks((), 0, most_turns(turns, 0))
