"""Adherence by turn with its interval.

The statistics here and in `statistics` are written out and not imported. scipy and statsmodels
would add 100 MB and a second of start-up for a dozen formulas. The tests compare both modules with
them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BeforeValidator, WithJsonSchema

from pipeline.records import Reply

K = TypeVar("K", bound=Hashable)

JsonFloat = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
"""A number whose nan is null in JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share `hits / n` with its 95 % Wilson interval."""

    hits: int
    n: int
    value: JsonFloat
    low: float
    high: float


Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


def wilson(hits: int, n: int, z: float = Z_95) -> Rate:
    """Return the Wilson score interval (E. B. Wilson 1927) of `hits` out of `n`.

    For n = 0 the value is nan and the interval (0, 1).
    """
    if n == 0:
        return Rate(hits=0, n=0, value=math.nan, low=0.0, high=1.0)
    p = hits / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return Rate(
        hits=hits,
        n=n,
        value=p,
        # At the ends the formula gives 0 and 1 but for rounding.
        low=middle - half if hits else 0.0,
        high=middle + half if hits < n else 1.0,
    )


def adherence(replies: Iterable[Reply], key: Callable[[Reply], K]) -> dict[K, Rate]:
    """Return the rate of adherent replies for each value of `key`."""
    return rates(replies, key, lambda reply: reply.adherent)


def rates(
    replies: Iterable[Reply], key: Callable[[Reply], K], is_hit: Callable[[Reply], bool]
) -> dict[K, Rate]:
    """Return the rate of hits for each value of `key`, in order of the key's first appearance.

    A reply whose turn 1 had left the context window ("context") says nothing about memory and is
    left out.
    """
    hits: dict[K, list[bool]] = defaultdict(list)
    for reply in replies:
        if reply.finish != "context":
            hits[key(reply)].append(is_hit(reply))
    return {name: wilson(sum(values), len(values)) for name, values in hits.items()}
