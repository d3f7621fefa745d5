"""Adherence to instructions that were not trained: new values, and new kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from pipeline.evaluation.rates import adherence
from pipeline.evaluation.scores import Scores, UnseenRow
from pipeline.evaluation.scoring.rows import K, rate_rows
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.records import Reply


def with_unseen(
    scores: Scores,
    replies: Sequence[Reply],
    dialogues: Sequence[AssignedDialogue],
    trained_kinds: set[str],
) -> Scores:
    """Return the scores with the rates of instructions that were not trained.

    They are grouped as unseen values (of trained kinds) and unseen kinds.
    """
    kinds = {d.dialogue.id: ", ".join(c.kind for c in d.constraints(0)) for d in dialogues}
    groups = {
        d.dialogue.id: "unseen value"
        if all(c.kind in trained_kinds for c in d.constraints(0))
        else "unseen kind"
        for d in dialogues
    }

    def rows(key: Callable[[Reply], K]) -> tuple[UnseenRow, ...]:
        return tuple(
            UnseenRow(group=group, **asdict(row))
            for group in dict.fromkeys(groups.values())
            for row in rate_rows(
                adherence(
                    [r for r in replies if groups[r.dialogue] == group],
                    lambda r: (r.arm, key(r)),
                )
            )
        )

    return replace(
        scores,
        generalization=rate_rows(adherence(replies, lambda r: (r.arm, groups[r.dialogue]))),
        by_unseen=rows(lambda r: kinds[r.dialogue]),
        unseen_by_turn=rows(lambda r: r.turn),
    )
