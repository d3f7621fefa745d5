"""From replies to the numbers of a report: plain data, which `evaluate/scores.json` holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from pipeline.evaluation.rates import Rate, adherence, rates, wilson
from pipeline.evaluation.statistics import (
    distinct_n,
    kaplan_meier,
    lifetimes,
    paired_bootstrap,
    sample_size,
)
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import kind_of, obeys
from pipeline.records import Constraint, Reply

Table = list[dict[str, Any]]


def scores(
    replies: Sequence[Reply],
    suites: Mapping[str, Sequence[AssignedDialogue]],
    pool: Sequence[Constraint],
) -> dict[str, Any]:
    """All figures. `suites` are the pairs that were measured ("evaluate" and those of `gatt.suites`), `pool` what was trained."""
    ours = {name: _of(replies, pairs) for name, pairs in suites.items()}
    found = trained(ours["evaluate"], suites["evaluate"])
    kinds = {c.kind for c in pool}
    if ours.get("unseen"):
        found |= _unseen(ours["unseen"], suites["unseen"], kinds)
    if ours.get("change"):
        found["change"] = _change(ours["change"], suites["change"])
    if ours.get("recall"):
        probes = [r for r in ours["recall"] if r.probe]
        found["recall"] = table(adherence(probes, lambda r: (r.arm, r.turn)))
        found["recall_by_attribute"] = table(adherence(probes, lambda r: (r.arm, r.probe)))
    if ours.get("plain"):
        found |= _leakage(ours["plain"], pool)
    if ours.get("single"):
        kind = {
            p.dialogue.id: p.instruction.constraints[0].kind
            for p in suites["single"]
            if p.instruction
        }
        found["single"] = table(adherence(ours["single"], lambda r: (r.arm, "all")))
        found["single_by_kind"] = table(
            adherence(ours["single"], lambda r: (r.arm, kind[r.dialogue]))
        )
    return found


def _of(replies: Iterable[Reply], pairs: Iterable[AssignedDialogue]) -> list[Reply]:
    names = {p.dialogue.id for p in pairs}
    return [r for r in replies if r.dialogue in names]


def trained(replies: Sequence[Reply], pairs: Sequence[AssignedDialogue]) -> dict[str, Any]:
    """Adherence by arm and turn, by arm and instruction or family, over the last five turns and over all but the first.

    `replies` counts for each arm: all, those that obey (good answers or not), those that are no answer, those that were
    cut at `max_tokens`, and those left out because turn 1 had left the window. `late_raw` is `late` without the condition
    that a reply also is an answer. `difference` is that of the last five turns from the base, `survival` the share of
    dialogues without a broken answer so far.
    """
    names = {p.dialogue.id: p.name for p in pairs}
    families = {
        p.dialogue.id: " and ".join(dict.fromkeys(kind_of(c).family for c in p.constraints(0)))
        for p in pairs
    }
    last = max((r.turn for r in replies), default=0)
    first_late = max(1, last - 4)
    at = f"turns {first_late} to {last}"
    late, later = [r for r in replies if r.turn >= first_late], [r for r in replies if r.turn > 1]
    by_arm, late_by_arm = _by_arm(replies), _by_arm(late)
    return {
        "turns": last,
        "by_turn": table(adherence(replies, lambda r: (r.arm, r.turn))),
        "by_instruction": table(adherence(replies, lambda r: (r.arm, names[r.dialogue]))),
        "by_family": table(adherence(replies, lambda r: (r.arm, families[r.dialogue]))),
        "last_five": table(adherence(late, lambda r: (r.arm, at))),
        "last_five_unfiltered": table(rates(late, lambda r: (r.arm, at), lambda r: r.obeys)),
        "after_first": table(adherence(later, lambda r: (r.arm, f"turns 2 to {last}"))),
        "replies": {arm: _count(mine) for arm, mine in by_arm.items()},
        "difference": {
            arm: asdict(paired_bootstrap(late_by_arm["base"], mine))
            for arm, mine in late_by_arm.items()
            if arm != "base"
        },
        "survival": {
            arm: asdict(kaplan_meier(lifetimes(mine).values())) for arm, mine in by_arm.items()
        },
        "distinct_2": {arm: distinct_n(mine, 2) for arm, mine in by_arm.items()},
        "required_sample_size": asdict(needed)
        if (needed := sample_size(late_by_arm["tuned"]))
        else None,
    }


def _by_arm(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    found: dict[str, list[Reply]] = {}
    for reply in replies:
        found.setdefault(reply.arm, []).append(reply)
    return found


def _count(replies: Sequence[Reply]) -> dict[str, int]:
    return {
        "all": len(replies),
        "obey": sum(r.obeys for r in replies),
        "no_answer": sum(bool(r.defect) for r in replies),
        "cut": sum(r.finish == "length" for r in replies),
        "left_out": sum(r.finish == "context" for r in replies),
    }


def _unseen(
    replies: Sequence[Reply], pairs: Sequence[AssignedDialogue], trained_kinds: set[str]
) -> dict[str, Table]:
    """New values of trained kinds apart from kinds that are new altogether."""
    told = {p.dialogue.id: p for p in pairs}
    group = {
        p.name: "unseen value"
        if all(c.kind in trained_kinds for c in p.constraints(0))
        else "unseen kind"
        for p in pairs
    }
    by_name = table(adherence(replies, lambda r: (r.arm, told[r.dialogue].name)))
    return {
        "generalization": table(
            adherence(replies, lambda r: (r.arm, group[told[r.dialogue].name]))
        ),
        "by_unseen": [{**row, "group": group[row["at"]]} for row in by_name],
    }


def _change(replies: Sequence[Reply], pairs: Sequence[AssignedDialogue]) -> dict[str, Any]:
    told = {p.dialogue.id: p for p in pairs}
    return {
        arm: _switch([r for r in mine if r.finish != "context"], told)
        for arm, mine in _by_arm(replies).items()
    }


def _switch(replies: Sequence[Reply], told: Mapping[str, AssignedDialogue]) -> dict[str, Any]:
    """Adherence of one arm to the old instruction before the change, and after it to the new one and (wrongly) to the old one.

    `turns_to_switch` is the median number of turns from the change to the first answer that obeys the new instruction (0: at
    once) over the dialogues where one does; `never` counts the others.
    """
    old = {
        (r.dialogue, r.turn)
        for r in replies
        if not r.defect and obeys(told[r.dialogue].constraints(0), r.text)
    }
    before = [r for r in replies if r.turn <= told[r.dialogue].change_turn]
    after = [r for r in replies if r.turn > told[r.dialogue].change_turn]
    new = {(r.dialogue, r.turn) for r in after if r.adherent}
    waits = {
        dialogue: turn - told[dialogue].change_turn - 1
        for dialogue, turn in sorted(new, reverse=True)
    }
    dialogues = {r.dialogue for r in after}
    by_turn = []
    for turn in sorted({r.turn for r in replies}):
        now = [(r.dialogue, r.turn) for r in replies if r.turn == turn]
        share = {
            name: sum(place in kept for place in now) / len(now)
            for name, kept in (("old", old), ("new", new))
        }
        by_turn.append({"at": turn, **share, "n": len(now)})
    return {
        "at": min((told[dialogue].change_turn + 1 for dialogue in dialogues), default=0),
        "before": _rate(before, old),
        "after": _rate(after, new),
        "old_after": _rate(after, old),
        "dialogues": len(dialogues),
        "never": len(dialogues - waits.keys()),
        "turns_to_switch": median(waits.values()) if waits else None,
        "by_turn": by_turn,
    }


def _rate(replies: Sequence[Reply], hits: set[tuple[str, int]]) -> dict[str, Any]:
    return asdict(wilson(sum((r.dialogue, r.turn) in hits for r in replies), len(replies)))


def _leakage(replies: Sequence[Reply], pool: Sequence[Constraint]) -> dict[str, Any]:
    """How often a reply shows something that was trained, where no instruction was given; and what."""
    shown = {id(r): [c.name for c in pool if obeys((c,), r.text)] for r in replies}
    return {
        "leakage": table(
            rates(replies, lambda r: (r.arm, "plain dialogues"), lambda r: bool(shown[id(r)]))
        ),
        "leaked": {
            arm: dict(Counter(name for r in mine for name in shown[id(r)]))
            for arm, mine in _by_arm(replies).items()
        },
    }


def table(found: Mapping[tuple[str, Any], Rate]) -> Table:
    """Rows of `arm`, `at` and the rate."""
    return [{"arm": arm, "at": at, **asdict(rate)} for (arm, at), rate in found.items()]
