"""From replies to the numbers of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TypeVar

from pipeline.evaluation.leakage import measure_leakage
from pipeline.evaluation.rates import Rate, adherence, rates, wilson
from pipeline.evaluation.scores import (
    ChangeScores,
    ChangeTurn,
    EventScores,
    RateRow,
    ReplyCounts,
    Scores,
    UnseenRow,
)
from pipeline.evaluation.statistics import (
    distinct_n,
    kaplan_meier,
    lifetimes,
    paired_bootstrap,
    required_sample_size,
)
from pipeline.evaluation.suites import PAPER_ATTRIBUTES
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import kind_of, obeys
from pipeline.records import Constraint, Reply

K = TypeVar("K", int, str)

_SHORT_PROMPT = 256
"""Tokens; shorter prompts are not told apart."""


def compute_scores(
    replies: Sequence[Reply],
    suites: Mapping[str, Sequence[AssignedDialogue]],
    trained: Sequence[Constraint],
) -> Scores:
    """Return all numbers of `replies`.

    `suites` are the dialogues that were measured ("evaluation" and those of `evaluation.suites`),
    `trained` are the constraints of training.
    """
    by_suite = {name: _of(replies, dialogues) for name, dialogues in suites.items()}
    scores = _trained(by_suite["evaluation"], suites["evaluation"])
    coverage = _coverage(by_suite["evaluation"], suites["evaluation"], trained)
    scores = replace(scores, coverage=coverage)
    unseen = [*suites.get("unseen_values", ()), *suites.get("unseen", ())]
    if unseen_replies := _of(replies, unseen):
        scores = _with_unseen(scores, unseen_replies, unseen, {c.kind for c in trained})
    if combined := by_suite.get("combined"):
        rows = rate_rows(adherence(combined, lambda r: (r.arm, "two at once")))
        scores = replace(scores, combined=rows)
    if changing := by_suite.get("change"):
        scores = replace(scores, change=_change(changing, suites["change"]))
    if stopping := by_suite.get("stop"):
        scores = replace(scores, stop=_event(stopping, suites["stop"]))
    if contradicting := by_suite.get("contradiction"):
        event = _event(contradicting, suites["contradiction"])
        scores = replace(scores, contradiction=event)
    if recall := by_suite.get("recall"):
        scores = _with_recall(scores, [r for r in recall if r.recall_attribute])
    if plain := by_suite.get("plain"):
        scores = replace(scores, leaks=measure_leakage(plain, trained))
    if single := by_suite.get("single"):
        kinds = {d.dialogue.id: d.constraints(0)[0].kind for d in suites["single"]}
        scores = replace(
            scores,
            single=rate_rows(adherence(single, lambda r: (r.arm, "all"))),
            single_by_kind=rate_rows(adherence(single, lambda r: (r.arm, kinds[r.dialogue]))),
        )
    return scores


def _with_recall(scores: Scores, answers: Sequence[Reply]) -> Scores:
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


def rate_rows(by_arm: Mapping[tuple[str, K], Rate]) -> tuple[RateRow, ...]:
    """Return a row for each rate; keys are an arm and what its replies are grouped by."""
    return tuple(RateRow(arm=arm, at=at, **asdict(rate)) for (arm, at), rate in by_arm.items())


def _rows_with_hits(by_arm: Mapping[tuple[str, K], Rate]) -> tuple[RateRow, ...]:
    return tuple(row for row in rate_rows(by_arm) if row.hits)


def _of(replies: Iterable[Reply], dialogues: Iterable[AssignedDialogue]) -> list[Reply]:
    ids = {d.dialogue.id for d in dialogues}
    return [r for r in replies if r.dialogue in ids]


def _by_arm(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    by_arm: dict[str, list[Reply]] = {}
    for reply in replies:
        by_arm.setdefault(reply.arm, []).append(reply)
    return by_arm


def _trained(replies: Sequence[Reply], dialogues: Sequence[AssignedDialogue]) -> Scores:
    """Return the numbers of the instructions that were trained."""
    kinds, families = ({d.dialogue.id: name(d) for d in dialogues} for name in (_kinds, _families))
    of_all = _by_arm(replies)
    turns = max((r.turn for r in replies if r.finish != "context"), default=0)
    unchecked = {r.dialogue for r in replies if r.obeys is None and r.finish != "context"}
    replies = [r for r in replies if r.dialogue not in unchecked]
    first = max(1, turns - 4)
    last_five = [r for r in replies if first <= r.turn <= turns]
    after_first = [r for r in replies if r.turn > 1]
    last_turns, later_turns = f"turns {first} to {turns}", f"turns 2 to {turns}"
    by_arm, last_five_by_arm = _by_arm(replies), _by_arm(last_five)
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


def _coverage(
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
    return ReplyCounts(
        all=len(replies),
        obey=sum(bool(r.obeys) for r in replies),
        no_answer=sum(bool(r.defect) for r in replies),
        cut=sum(r.finish == "length" for r in replies),
        left_out=sum(r.finish == "context" for r in replies),
        unchecked=sum(r.obeys is None for r in replies),
    )


def _with_unseen(
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


def _event(
    replies: Sequence[Reply], dialogues: Sequence[AssignedDialogue]
) -> dict[str, EventScores]:
    """Return adherence to the first instruction before and after its turn of change, by arm."""
    by_id = {d.dialogue.id: d for d in dialogues}

    def obeyed(reply: Reply) -> bool:
        return not reply.defect and obeys(by_id[reply.dialogue].constraints(0), reply.text)

    def share(of_arm: Sequence[Reply], *, after: bool) -> Rate:
        return _share(
            obeyed(r) for r in of_arm if (r.turn > by_id[r.dialogue].change_turn) == after
        )

    valid = [r for r in replies if r.finish != "context"]
    return {
        arm: EventScores(share(of_arm, after=False), share(of_arm, after=True))
        for arm, of_arm in _by_arm(valid).items()
    }


@dataclass(frozen=True, slots=True)
class _ChangeReply:
    """A reply in a dialogue whose instruction changes, and which of the two it obeys.

    `wait` counts turns since the change: negative before it, 0 in its turn.
    """

    dialogue: str
    turn: int
    wait: int
    old: bool
    new: bool


def _change(
    replies: Sequence[Reply], dialogues: Sequence[AssignedDialogue]
) -> dict[str, ChangeScores]:
    by_id = {d.dialogue.id: d for d in dialogues}
    return {
        arm: _change_scores(
            [_change_reply(r, by_id[r.dialogue]) for r in of_arm if r.finish != "context"]
        )
        for arm, of_arm in _by_arm(replies).items()
    }


def _change_reply(reply: Reply, dialogue: AssignedDialogue) -> _ChangeReply:
    wait = reply.turn - dialogue.change_turn - 1
    return _ChangeReply(
        reply.dialogue,
        reply.turn,
        wait,
        old=not reply.defect and obeys(dialogue.constraints(0), reply.text),
        new=wait >= 0 and reply.adherent,
    )


def _change_scores(replies: Sequence[_ChangeReply]) -> ChangeScores:
    """Return the numbers of one arm."""
    before = [r for r in replies if r.wait < 0]
    after = [r for r in replies if r.wait >= 0]
    dialogues = {r.dialogue for r in after}
    waits: dict[str, int] = {}
    for reply in after:
        if reply.new:
            waits[reply.dialogue] = min(reply.wait, waits.get(reply.dialogue, reply.wait))
    return ChangeScores(
        change_turn=min((r.turn - r.wait for r in after), default=0),
        before=_share(r.old for r in before),
        after=_share(r.new for r in after),
        old_after=_share(r.old for r in after),
        dialogues=len(dialogues),
        never_switched=len(dialogues - waits.keys()),
        turns_to_switch=median(waits.values()) if waits else None,
        by_turn=tuple(
            _change_turn(turn, [r for r in replies if r.turn == turn])
            for turn in sorted({r.turn for r in replies})
        ),
    )


def _change_turn(turn: int, replies: Sequence[_ChangeReply]) -> ChangeTurn:
    n = len(replies)
    old, new = sum(r.old for r in replies), sum(r.new for r in replies)
    return ChangeTurn(turn=turn, old=old / n, new=new / n, n=n)


def _share(hits: Iterable[bool]) -> Rate:
    values = list(hits)
    return wilson(sum(values), len(values))
