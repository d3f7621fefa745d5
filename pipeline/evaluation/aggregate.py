"""From replies to the numbers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.evaluation.rates import adherence
from pipeline.evaluation.scores import Scores
from pipeline.evaluation.scoring.events import custom_event_arms, event_arms
from pipeline.evaluation.scoring.leakage import measure_leakage
from pipeline.evaluation.scoring.recall import with_recall
from pipeline.evaluation.scoring.rows import rate_rows, replies_to
from pipeline.evaluation.scoring.trained import coverage, trained_scores
from pipeline.evaluation.scoring.unseen import with_unseen
from pipeline.gatt.assign import trained_constraints
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.records import Constraint, Reply

_AT_ONCE = {2: "two at once", 3: "three at once"}


def compute_scores(
    replies: Sequence[Reply],
    suites: Mapping[str, Sequence[AssignedDialogue]],
    trained: Sequence[Constraint],
) -> Scores:
    """Return all numbers of `replies`.

    `suites` are the dialogues that were measured ("evaluation" and those of `evaluation.suites`),
    `trained` are the constraints of training, without the checks of the user's own instructions.
    """
    by_suite = {name: replies_to(replies, dialogues) for name, dialogues in suites.items()}
    evaluation = suites["evaluation"]
    scores = trained_scores(by_suite["evaluation"], evaluation)
    events = event_arms(replies, suites)
    scores = replace(
        scores,
        coverage=coverage(by_suite["evaluation"], evaluation, trained),
        change=events.change,
        stop=events.stop,
        contradiction=events.contradiction,
        custom_events=custom_event_arms(replies, suites),
    )
    unseen = [*suites.get("unseen_values", ()), *suites.get("unseen", ())]
    if unseen_replies := replies_to(replies, unseen):
        scores = with_unseen(scores, unseen_replies, unseen, {c.kind for c in trained})
    if combined := by_suite.get("combined"):
        counts = {d.dialogue.id: len(d.constraints(0)) for d in suites["combined"]}
        ordered = sorted(combined, key=lambda r: counts[r.dialogue])
        rows = rate_rows(adherence(ordered, lambda r: (r.arm, _AT_ONCE[counts[r.dialogue]])))
        scores = replace(scores, combined=rows)
    if recall := by_suite.get("recall"):
        scores = with_recall(scores, [r for r in recall if r.recall_attribute])
    if plain := by_suite.get("plain"):
        checks = trained_constraints([d for d in evaluation if d.is_custom])
        scores = replace(scores, leaks=measure_leakage(plain, [*trained, *checks]))
    if single := by_suite.get("single"):
        kinds = {d.dialogue.id: d.constraints(0)[0].kind for d in suites["single"]}
        scores = replace(
            scores,
            single=rate_rows(adherence(single, lambda r: (r.arm, "all"))),
            single_by_kind=rate_rows(adherence(single, lambda r: (r.arm, kinds[r.dialogue]))),
        )
    return scores
