"""Rates as rows of a report, and the replies that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TypeVar

from pipeline.evaluation.rates import Rate, wilson
from pipeline.evaluation.scores import RateRow
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.records import Reply

K = TypeVar("K", int, str)


def rate_rows(by_arm: Mapping[tuple[str, K], Rate]) -> tuple[RateRow, ...]:
    """Return a row for each rate; keys are an arm and what its replies are grouped by."""
    return tuple(RateRow(arm=arm, at=at, **asdict(rate)) for (arm, at), rate in by_arm.items())


def share(hits: Iterable[bool]) -> Rate:
    """Return how many of the values are true."""
    values = list(hits)
    return wilson(sum(values), len(values))


def replies_to(replies: Iterable[Reply], dialogues: Iterable[AssignedDialogue]) -> list[Reply]:
    """Return the replies to these dialogues."""
    ids = {d.dialogue.id for d in dialogues}
    return [r for r in replies if r.dialogue in ids]


def replies_by_arm(replies: Iterable[Reply]) -> dict[str, list[Reply]]:
    """Return the replies of each arm, in order."""
    by_arm: dict[str, list[Reply]] = {}
    for reply in replies:
        by_arm.setdefault(reply.arm, []).append(reply)
    return by_arm
