"""Is the tuned arm better, how long does an instruction last, would more dialogues tell, and is the text still varied?

The unit of independence is the dialogue: its replies follow from one another. Turns are counted from 1, shares lie in 0..1,
intervals are 95 % ones, and a number that the replies do not determine is nan. Replies whose turn 1 had left the window
(`finish` "context") are left out everywhere, as in `metrics.adherence`. Every function but `paired_bootstrap` takes the
replies of *one* arm. Not for the rate of one arm: that is `metrics.adherence`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from statistics import NormalDist, quantiles

from pipeline.evaluation.rates import wilson
from pipeline.gatt.text import words
from pipeline.records import Reply

_Z = NormalDist().inv_cdf(0.975)


def _by_dialogue(replies: Iterable[Reply]) -> dict[str, dict[int, bool]]:
    """Dialogue → turn → adherent, of what was measured. ValueError for a turn that comes twice: these are several arms."""
    found: dict[str, dict[int, bool]] = {}
    for reply in replies:
        if reply.finish == "context":
            continue
        turns = found.setdefault(reply.dialogue, {})
        if reply.turn in turns:
            raise ValueError(
                f"two replies in turn {reply.turn} of dialogue {reply.dialogue!r}; expected the replies of one arm"
            )
        turns[reply.turn] = reply.adherent
    return found


def _sums(replies: Iterable[Reply]) -> dict[str, tuple[int, int]]:
    """Dialogue → adherent replies, measured replies (at least 1)."""
    return {
        dialogue: (sum(turns.values()), len(turns))
        for dialogue, turns in _by_dialogue(replies).items()
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """Adherence of one arm minus that of another, -1..1, with its 95 % interval over so many common dialogues."""

    difference: float
    low: float
    high: float
    dialogues: int


def paired_bootstrap(
    base: Iterable[Reply], tuned: Iterable[Reply], resamples: int = 2000, seed: int = 0
) -> Difference:
    """Adherence of `tuned` minus `base` with a percentile interval: Efron 1979; pairs and clusters, Davison & Hinkley 1997.

    Whole dialogues are drawn with replacement, with the replies of both arms. Adherence is that of all replies together, so
    a longer dialogue weighs more. Dialogues that only one arm was measured on are left out. The interval is -1..1 for fewer
    than two dialogues, too narrow by some for fewer than about twenty, and without width where all dialogues are alike.
    ValueError for a turn that comes twice, and for fewer than two resamples.
    """
    if resamples < 2:
        raise ValueError(f"{resamples} resamples; expected at least 2")
    ours, theirs = _sums(tuned), _sums(base)
    # In one order whatever the order of the replies: the same seed then draws the same dialogues.
    pairs = [
        (*ours[dialogue], *theirs[dialogue]) for dialogue in sorted(ours.keys() & theirs.keys())
    ]
    if len(pairs) < 2:
        return Difference(_difference(pairs) if pairs else math.nan, -1.0, 1.0, len(pairs))
    random = Random(seed)
    drawn = [_difference(random.choices(pairs, k=len(pairs))) for _ in range(resamples)]
    cuts = quantiles(drawn, n=40, method="inclusive")
    return Difference(_difference(pairs), cuts[0], cuts[-1], len(pairs))


def _difference(pairs: Iterable[tuple[int, int, int, int]]) -> float:
    our_hits, our_n, their_hits, their_n = map(sum, zip(*pairs, strict=True))
    return our_hits / our_n - their_hits / their_n


@dataclass(frozen=True, slots=True)
class Lifetime:
    """The turn of a dialogue's first broken answer; or, where none is `broken`, its last measured turn (censored)."""

    turn: int
    broken: bool


def lifetimes(replies: Iterable[Reply]) -> dict[str, Lifetime]:
    """Dialogue → how long the instruction lasted; a dialogue without a measured reply is left out.

    ValueError for a turn that comes twice.
    """
    found = {}
    for dialogue, turns in _by_dialogue(replies).items():
        breaks = [turn for turn, adherent in turns.items() if not adherent]
        found[dialogue] = Lifetime(min(breaks) if breaks else max(turns), bool(breaks))
    return found


@dataclass(frozen=True, slots=True)
class SurvivalStep:
    """The share `value` of dialogues that are unbroken *after* `turn`, its 95 % interval, and what the turn adds to it.

    `at_risk` dialogues came unbroken to this turn and were measured in it; `broken` of them broke in it.
    """

    turn: int
    at_risk: int
    broken: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Survival:
    """A survival curve, a step for every turn from 1 to the last measured, over so many dialogues.

    `median` is the first turn after which at most half of the dialogues are unbroken, None where the curve stays above.
    """

    dialogues: int
    steps: tuple[SurvivalStep, ...]
    median: int | None


def kaplan_meier(lives: Iterable[Lifetime]) -> Survival:
    """The product-limit estimate (Kaplan & Meier 1958) with the log-log interval (Kalbfleisch & Prentice 1980).

    The variance is Greenwood's (1926). A dialogue censored in a turn was measured in it and counts as at risk there. Where
    the curve is 1 or 0 the log-log interval is undefined, and the Wilson interval of the dialogues at risk in that turn
    stands in its place; as fewer are at risk than at the start, it is the wider for it. No lives: no steps, no median.
    """
    found = list(lives)
    steps: list[SurvivalStep] = []
    # Exact, since a product of floats may stop a hair above one half, and the median with it.
    value, greenwood, high = Fraction(1), Fraction(0), 1.0
    for turn in range(1, max((life.turn for life in found), default=0) + 1):
        at_risk = sum(life.turn >= turn for life in found)
        broken = sum(life.turn == turn and life.broken for life in found)
        value *= Fraction(at_risk - broken, at_risk)
        if 0 < value < 1:
            greenwood += Fraction(broken, at_risk * (at_risk - broken))
            spread = math.exp(_Z * math.sqrt(greenwood) / -math.log(value))
            low, high = float(value) ** spread, float(value) ** (1 / spread)
        else:
            wide = wilson(at_risk - broken, at_risk)
            low, high = wide.low, min(wide.high, high)
        steps.append(SurvivalStep(turn, at_risk, broken, float(value), low, high))
    median = next((step.turn for step in steps if step.value <= 0.5), None)
    return Survival(len(found), tuple(steps), median)


def intraclass_correlation(replies: Iterable[Reply]) -> float:
    """How alike the replies of one dialogue are in adherence, -1..1: the ANOVA estimator (Ridout, Demétrio & Firth 1999).

    1: each dialogue holds or fails as a whole; 0: replies are as good as independent; below 0: chance, or alternation. nan
    for fewer than two dialogues, one reply in each, or replies that are all adherent or all not. ValueError for a turn that
    comes twice.
    """
    return _correlation(list(_sums(replies).values()))


def _correlation(sums: list[tuple[int, int]]) -> float:
    k, hits, n = len(sums), sum(h for h, _ in sums), sum(m for _, m in sums)
    if k < 2 or n == k or hits in (0, n):
        return math.nan
    between = sum(m * (h / m - hits / n) ** 2 for h, m in sums) / (k - 1)
    within = sum(h * (m - h) / m for h, m in sums) / (n - k)
    size = (n - sum(m * m for _, m in sums) / n) / (k - 1)
    return (between - within) / (between + (size - 1) * within)


def design_effect(size: float, correlation: float) -> float:
    """By how much dialogues of `size` replies need more replies than independent ones: 1 + (size - 1) ICC (Kish 1965).

    At least 1: a correlation below 0 is taken for chance. `size` itself, the worst, where the correlation is nan.
    ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"dialogues of {size} replies; expected at least 1")
    return 1 + (size - 1) * (1.0 if math.isnan(correlation) else max(0.0, correlation))


def answers_needed(
    rate: float, difference: float = 0.05, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Independent answers *in each arm* that tell `rate` from `rate + difference`, two-sided (Fleiss, Levin & Paik 2003, ch. 4).

    The normal approximation with pooled variance under equality, without correction for continuity. ValueError for rates
    out of 0..1, for no difference, for a power out of `alpha`/2..1 and an alpha out of 0..1.
    """
    other = rate + difference
    if not (0 <= rate <= 1 and 0 <= other <= 1 and difference):
        raise ValueError(f"rates {rate} and {other}; expected two different ones in 0..1")
    if not 0 < alpha / 2 < power < 1 or alpha >= 1:
        raise ValueError(
            f"power {power} at alpha {alpha}; expected 0 < alpha < 1 and alpha / 2 < power < 1"
        )
    middle = (rate + other) / 2
    equal = NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(2 * middle * (1 - middle))
    apart = NormalDist().inv_cdf(power) * math.sqrt(rate * (1 - rate) + other * (1 - other))
    return math.ceil(((equal + apart) / difference) ** 2)


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What an evaluation needs *in each arm* to show a difference, and what that was reckoned from.

    `answers` would do were they independent; `dialogues` of the measured length do as they are.
    """

    answers: int
    dialogues: int
    correlation: float
    design_effect: float


def sample_size(
    replies: Iterable[Reply], difference: float = 0.05, power: float = 0.8, alpha: float = 0.05
) -> SampleSize | None:
    """Dialogues that show `difference` from the rate of these replies (`answers_needed`), inflated by their `design_effect`.

    From rates too near the end for `difference`, the difference in the other direction. For dialogues of unequal length the
    size in the design effect is the mean weighted by length (Donner & Klar 2000). An upper bound: arms on the same
    dialogues are compared in pairs, which tells more. None without a measured reply, else ValueError as in `answers_needed`.
    """
    sums = list(_sums(replies).values())
    if not sums:
        return None
    hits, n = sum(h for h, _ in sums), sum(m for _, m in sums)
    inside = 0 <= hits / n + difference <= 1
    answers = answers_needed(hits / n, difference if inside else -difference, power, alpha)
    correlation = _correlation(sums)
    effect = design_effect(sum(m * m for _, m in sums) / n, correlation)
    return SampleSize(answers, math.ceil(answers * effect * len(sums) / n), correlation, effect)


def distinct_n(replies: Iterable[Reply], n: int) -> float:
    """Different n-grams of words over all n-grams, pooled over the replies: "distinct-n" (Li et al. 2016, who divide by the words).

    `words` as in `gatt.text`: lowercase, no punctuation; an n-gram does not reach over two replies. The more text, the
    smaller: compare arms of like length only. nan where there is no n-gram, ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"{n}-grams; expected n of at least 1")
    grams: list[tuple[str, ...]] = []
    for reply in replies:
        if reply.finish != "context":
            said = words(reply.text)
            grams += zip(*(said[start:] for start in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else math.nan
