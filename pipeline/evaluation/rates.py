"""Adherence by turn and its interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.records import Reply

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rate:
    """A share `hits / n` with its 95 % Wilson interval."""

    hits: int
    n: int
    value: float
    low: float
    high: float


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> Rate:
    """The Wilson score interval (E. B. Wilson 1927) of `hits` out of `n`; (0, 1) around nothing for n = 0."""
    if n == 0:
        return Rate(0, 0, math.nan, 0.0, 1.0)
    p = hits / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At the ends the formula gives 0 and 1 but for rounding.
    return Rate(hits, n, p, middle - half if hits else 0.0, middle + half if hits < n else 1.0)


def adherence(replies: Iterable[Reply], key: Callable[[Reply], K]) -> dict[K, Rate]:
    """The rate of adherent replies for each value of `key`."""
    return rates(replies, key, lambda reply: reply.adherent)


def rates(
    replies: Iterable[Reply], key: Callable[[Reply], K], hit: Callable[[Reply], bool]
) -> dict[K, Rate]:
    """The rate of replies that are a `hit` for each value of `key`, in order of `key`'s first appearance.

    A reply whose turn 1 had left the context window ("context") says nothing about memory and is left out.
    """
    counts: dict[K, list[bool]] = defaultdict(list)
    for reply in replies:
        if reply.finish != "context":
            counts[key(reply)].append(hit(reply))
    return {name: wilson(sum(hits), len(hits)) for name, hits in counts.items()}
