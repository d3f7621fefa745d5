"""Adherence to the instructions of training: by turn, length and kind, and how long it lasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.evaluation.rates import Rate, adherence, rates
from pipeline.evaluation.scores import RateRow, ReplyCounts, Scores
from pipeline.evaluation.scoring.rows import K, rate_rows, replies_by_arm
from pipeline.evaluation.statistics import (
    distinct_n,
    kaplan_meier,
    lifetimes,
    paired_bootstrap,
    required_sample_size,
)
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import kind_of
from pipeline.records import Constraint, Reply

_SHORT_PROMPT = 256
"""Tokens; shorter prompts are not told apart."""


def trained_scores(replies: Sequence[Reply], dialogues: Sequence[AssignedDialogue]) -> Scores:
    """Return the numbers of the instructions that were trained."""
    kinds, families = ({d.dialogue.id: name(d) for d in dialogues} for name in (_kinds, _families))
    of_all = replies_by_arm(replies)
    turns = max((r.turn for r in replies if r.finish != "context"), default=0)
    unchecked = {r.dialogue for r in replies if r.obeys is None and r.finish != "context"}
    replies = [r for r in replies if r.dialogue not in unchecked]
    first = max(1, turns - 4)
    last_five = [r for r in replies if first <= r.turn <= turns]
    after_first = [r for r in replies if r.turn > 1]
    last_turns, later_turns = f"turns {first} to {turns}", f"turns 2 to {turns}"
    by_arm, last_five_by_arm = replies_by_arm(replies), replies_by_arm(last_five)
    return Scores(
        turns=turns,
        by_turn=rate_rows(adherence(replies, lambda r: (r.arm, r.turn))),
        by_length=rate_rows(
            adherence([r for r in after_first if r.prompt_tokens], lambda r: (r.arm, _length(r)))
        ),
        by_instruction=rate_rows(adherence(replies, lambda r: (r.arm, kinds[r.dialogue]))),
        obey_no_answer=_rows_with_hits(
            rates(
                replies, lambda r: (r.arm, kinds[r.dialogue]), lambda r: bool(r.obeys and r.defect)
            )
        ),
        cut_before_obeying=_rows_with_hits(
            rates(
                replies,
                lambda r: (r.arm, kinds[r.dialogue]),
                lambda r: r.finish == "length" and not r.obeys,
            )
        ),
        by_family=rate_rows(adherence(replies, lambda r: (r.arm, families[r.dialogue]))),
        last_five=rate_rows(adherence(last_five, lambda r: (r.arm, last_turns))),
        last_five_unfiltered=rate_rows(
            rates(last_five, lambda r: (r.arm, last_turns), lambda r: bool(r.obeys))
        ),
        after_first=rate_rows(adherence(after_first, lambda r: (r.arm, later_turns))),
        replies={arm: _count(of_arm) for arm, of_arm in of_all.items()},
        difference={
            arm: paired_bootstrap(last_five_by_arm["base"], of_arm)
            for arm, of_arm in last_five_by_arm.items()
            if arm != "base"
        },
        survival={arm: kaplan_meier(lifetimes(of_arm).values()) for arm, of_arm in by_arm.items()},
        distinct_2={arm: distinct_n(of_arm, 2) for arm, of_arm in of_all.items()},
        required_sample_size=required_sample_size(last_five_by_arm.get("tuned", ())),
        unchecked=tuple(dict.fromkeys(d.name for d in dialogues if d.dialogue.id in unchecked)),
    )


def _rows_with_hits(by_arm: Mapping[tuple[str, K], Rate]) -> tuple[RateRow, ...]:
    return tuple(row for row in rate_rows(by_arm) if row.hits)


def coverage(
    replies: Sequence[Reply],
    dialogues: Sequence[AssignedDialogue],
    trained: Sequence[Constraint],
) -> dict[str, tuple[int, int]]:
    """Return by kind how many of the constraints of training were measured, and how many are."""
    answered = {r.dialogue for r in replies if r.finish != "context" and r.obeys is not None}
    measured = {c for d in dialogues if d.dialogue.id in answered for c in d.constraints(0)}
    return {
        kind: (len([c for c in measured & set(trained) if c.kind == kind]), count)
        for kind, count in Counter(c.kind for c in dict.fromkeys(trained)).items()
    }


def _length(reply: Reply) -> int:
    """Return the power of two that bounds the tokens of the reply's prompt."""
    limit = _SHORT_PROMPT
    while reply.prompt_tokens > limit:
        limit *= 2
    return limit


def _kinds(dialogue: AssignedDialogue) -> str:
    """Return the kinds of a dialogue's constraints, or the name of a custom instruction."""
    if dialogue.is_custom:
        return dialogue.name
    return ", ".join(c.kind for c in dialogue.constraints(0))


def _families(dialogue: AssignedDialogue) -> str:
    if dialogue.is_custom:
        return "custom"
    return " and ".join(dict.fromkeys(kind_of(c).family for c in dialogue.constraints(0)))


def _count(replies: Sequence[Reply]) -> ReplyCounts:
    measured = [r for r in replies if r.finish != "context"]
    return ReplyCounts(
        all=len(measured),
        obey=sum(bool(r.obeys) for r in measured),
        no_answer=sum(bool(r.defect) for r in measured),
        cut=sum(r.finish == "length" for r in measured),
        left_out=len(replies) - len(measured),
        unchecked=sum(r.obeys is None for r in measured),
    )
