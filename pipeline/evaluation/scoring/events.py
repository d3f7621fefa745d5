"""What happens around the turn in which the user changes, ends or contradicts the instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from statistics import median

from pipeline.evaluation.scores import ChangeScores, ChangeTurn, EventArms, EventScores
from pipeline.evaluation.scoring.rows import replies_to, share
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys
from pipeline.records import Reply


@dataclass(frozen=True, slots=True)
class _EventReply:
    """A reply in a dialogue with such a turn, and which instruction it obeys.

    `wait` counts turns since: negative before it, 0 in its turn.
    """

    dialogue: str
    turn: int
    wait: int
    old: bool
    new: bool


def event_arms(
    replies: Sequence[Reply], suites: Mapping[str, Sequence[AssignedDialogue]]
) -> EventArms:
    """Return the scores of the suites "change", "stop" and "contradiction", as far as measured."""
    by_suite = {
        name: _event_replies(replies_to(replies, suites.get(name, ())), suites.get(name, ()))
        for name in ("change", "stop", "contradiction")
    }
    return EventArms(
        change={arm: _change_scores(of_arm) for arm, of_arm in by_suite["change"].items()},
        stop={arm: _event_scores(of_arm) for arm, of_arm in by_suite["stop"].items()},
        contradiction={
            arm: _event_scores(of_arm) for arm, of_arm in by_suite["contradiction"].items()
        },
    )


def custom_event_arms(
    replies: Sequence[Reply], suites: Mapping[str, Sequence[AssignedDialogue]]
) -> EventArms:
    """Return the same of the instructions in the user's own words, where a suite has others too."""
    mixed = {
        name: custom
        for name, dialogues in suites.items()
        if len(custom := [d for d in dialogues if d.is_custom]) < len(dialogues)
    }
    return event_arms(replies, mixed)


def _event_replies(
    replies: Sequence[Reply], dialogues: Sequence[AssignedDialogue]
) -> dict[str, list[_EventReply]]:
    """Return the replies of each arm with what they obey; checks see the dialogue up to them."""
    by_id = {d.dialogue.id: d for d in dialogues}
    texts = {(r.arm, r.dialogue, r.turn): r.text for r in replies}
    by_arm: dict[str, list[_EventReply]] = {}
    for reply in replies:
        if reply.finish == "context":
            continue
        dialogue = by_id[reply.dialogue]
        keys = ((reply.arm, reply.dialogue, turn) for turn in count(1))
        earlier = [texts[key] for key in takewhile(texts.__contains__, keys)][: reply.turn - 1]
        wait = reply.turn - dialogue.change_turn - 1
        is_old = not reply.defect and obeys(
            dialogue.constraints(0), reply.text, dialogue.student_prompt(earlier, "")
        )
        by_arm.setdefault(reply.arm, []).append(
            _EventReply(
                reply.dialogue, reply.turn, wait, old=is_old, new=wait >= 0 and reply.adherent
            )
        )
    return by_arm


def _event_scores(replies: Sequence[_EventReply]) -> EventScores:
    """Return adherence of one arm to the first instruction before and after the turn."""
    return EventScores(
        before=share(r.old for r in replies if r.wait < 0),
        after=share(r.old for r in replies if r.wait >= 0),
    )


def _change_scores(replies: Sequence[_EventReply]) -> ChangeScores:
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
        before=share(r.old for r in before),
        after=share(r.new for r in after),
        old_after=share(r.old for r in after),
        dialogues=len(dialogues),
        never_switched=len(dialogues - waits.keys()),
        turns_to_switch=median(waits.values()) if waits else None,
        by_turn=tuple(
            _change_turn(turn, [r for r in replies if r.turn == turn])
            for turn in sorted({r.turn for r in replies})
        ),
    )


def _change_turn(turn: int, replies: Sequence[_EventReply]) -> ChangeTurn:
    n = len(replies)
    old, new = sum(r.old for r in replies), sum(r.new for r in replies)
    return ChangeTurn(turn=turn, old=old / n, new=new / n, n=n)
