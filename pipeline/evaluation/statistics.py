"""Whether the tuned arm is better, how long an instruction holds, how many dialogues are needed.

The unit of independence is the dialogue: its replies follow from one another. Turns are counted
from 1, shares lie in 0..1, intervals are 95 % ones, and a number that the replies do not determine
is nan. Replies whose turn 1 had left the window (`finish` "context") are left out everywhere, as in
`rates`. Every function but `paired_bootstrap` takes the replies of one arm.

Why these formulas are written out and not imported: see `rates`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from statistics import NormalDist, quantiles

from pipeline.evaluation.rates import JsonFloat, wilson
from pipeline.gatt.text import words
from pipeline.records import Reply

_Z = NormalDist().inv_cdf(0.975)


def _by_dialogue(replies: Iterable[Reply]) -> dict[str, dict[int, bool]]:
    """Return dialogue → turn → adherent, of what was measured.

    Raises:
        ValueError: a turn comes twice, as in the replies of several arms.
    """
    dialogues: dict[str, dict[int, bool]] = {}
    for reply in replies:
        if reply.finish == "context":
            continue
        turns = dialogues.setdefault(reply.dialogue, {})
        if reply.turn in turns:
            raise ValueError(
                f"two replies in turn {reply.turn} of dialogue {reply.dialogue!r}; "
                "expected the replies of one arm"
            )
        turns[reply.turn] = reply.adherent
    return dialogues


def _sums(replies: Iterable[Reply]) -> dict[str, tuple[int, int]]:
    """Return dialogue → adherent replies, measured replies (at least 1)."""
    return {
        dialogue: (sum(turns.values()), len(turns))
        for dialogue, turns in _by_dialogue(replies).items()
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """Adherence of an arm minus that of another, -1..1, with its 95 % interval.

    It is over the `dialogues` that both were measured on.
    """

    difference: JsonFloat
    low: float
    high: float
    dialogues: int


def paired_bootstrap(
    base: Iterable[Reply], tuned: Iterable[Reply], resamples: int = 2000, seed: int = 0
) -> Difference:
    """Return the adherence of `tuned` minus `base` with a percentile interval.

    Efron 1979; pairs and clusters, Davison & Hinkley 1997. Dialogues are drawn with replacement,
    with the replies of both arms. Adherence is that of all replies together, so a longer dialogue
    weighs more. Dialogues that only one arm was measured on are left out. The interval is -1..1 for
    fewer than two dialogues, somewhat too narrow for fewer than about twenty, and without width
    where all dialogues are alike.

    Raises:
        ValueError: a turn comes twice, or there are fewer than two resamples.
    """
    if resamples < 2:
        raise ValueError(f"{resamples} resamples; expected at least 2")
    tuned_sums, base_sums = _sums(tuned), _sums(base)
    # Sorted, whatever the order of the replies: the same seed then draws the same dialogues.
    common = sorted(tuned_sums.keys() & base_sums.keys())
    pairs = [(*tuned_sums[dialogue], *base_sums[dialogue]) for dialogue in common]
    if len(pairs) < 2:
        return Difference(_difference(pairs) if pairs else math.nan, -1.0, 1.0, len(pairs))
    random = Random(seed)
    differences = [_difference(random.choices(pairs, k=len(pairs))) for _ in range(resamples)]
    cuts = quantiles(differences, n=40, method="inclusive")
    return Difference(_difference(pairs), cuts[0], cuts[-1], len(pairs))


def _difference(pairs: Iterable[tuple[int, int, int, int]]) -> float:
    tuned_hits, tuned_n, base_hits, base_n = map(sum, zip(*pairs, strict=True))
    return tuned_hits / tuned_n - base_hits / base_n


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """The turn of a dialogue's first broken answer.

    Where no answer is `broken` it is the last measured turn (censored).
    """

    turn: int
    broken: bool


def lifetimes(replies: Iterable[Reply]) -> dict[str, Lifetime]:
    """Return how long the instruction lasted in each dialogue that has a measured reply.

    Raises:
        ValueError: a turn comes twice.
    """
    lives = {}
    for dialogue, turns in _by_dialogue(replies).items():
        breaks = [turn for turn, adherent in turns.items() if not adherent]
        lives[dialogue] = Lifetime(turn=min(breaks) if breaks else max(turns), broken=bool(breaks))
    return lives


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivalStep:
    """The share `value` of dialogues that are unbroken *after* `turn`, with its 95 % interval.

    `at_risk` dialogues came unbroken to this turn and were measured in it; `broken` of them broke.
    """

    turn: int
    at_risk: int
    broken: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Survival:
    """A survival curve of `dialogues`, with a step for every turn from 1 to the last measured.

    `median` is the first turn after which at most half of the dialogues are unbroken, None where
    the curve stays above.
    """

    dialogues: int
    steps: tuple[SurvivalStep, ...]
    median: int | None


def kaplan_meier(lives: Iterable[Lifetime]) -> Survival:
    """Return the product-limit estimate (Kaplan & Meier 1958) with its log-log interval.

    The interval is that of Kalbfleisch & Prentice 1980 with Greenwood's variance (1926). A dialogue
    censored in a turn was measured in it and counts as at risk there. Where the curve is 1 or 0 the
    log-log interval is undefined. The Wilson interval of the dialogues at risk in that turn is
    taken. It is wider, as fewer are at risk than at the start. Without lives there are no steps and
    no median.
    """
    lives = list(lives)
    steps: list[SurvivalStep] = []
    # Fractions: a product of floats may stop just above one half, and miss the median.
    value, greenwood, high = Fraction(1), Fraction(0), 1.0
    for turn in range(1, max((life.turn for life in lives), default=0) + 1):
        at_risk = sum(life.turn >= turn for life in lives)
        broken = sum(life.turn == turn and life.broken for life in lives)
        value *= Fraction(at_risk - broken, at_risk)
        if 0 < value < 1:
            greenwood += Fraction(broken, at_risk * (at_risk - broken))
            spread = math.exp(_Z * math.sqrt(greenwood) / -math.log(value))
            low, high = float(value) ** spread, float(value) ** (1 / spread)
        else:
            interval = wilson(at_risk - broken, at_risk)
            low, high = interval.low, min(interval.high, high)
        steps.append(
            SurvivalStep(
                turn=turn,
                at_risk=at_risk,
                broken=broken,
                value=float(value),
                low=low,
                high=high,
            )
        )
    median = next((step.turn for step in steps if step.value <= 0.5), None)
    return Survival(len(lives), tuple(steps), median)


def _intraclass_correlation(sums: list[tuple[int, int]]) -> float:
    """Return how alike the replies of one dialogue are in adherence, -1..1.

    The ANOVA estimator (Ridout, Demétrio & Firth 1999). 1: each dialogue holds or fails as a unit;
    0: replies are as good as independent; below 0: chance, or alternation. It is nan for fewer than
    two dialogues, one reply in each, or replies that are all adherent or all not.
    """
    k, hits, n = len(sums), sum(h for h, _ in sums), sum(m for _, m in sums)
    if k < 2 or n == k or hits in (0, n):
        return math.nan
    between = sum(m * (h / m - hits / n) ** 2 for h, m in sums) / (k - 1)
    within = sum(h * (m - h) / m for h, m in sums) / (n - k)
    size = (n - sum(m * m for _, m in sums) / n) / (k - 1)
    return (between - within) / (between + (size - 1) * within)


def design_effect(size: float, correlation: float) -> float:
    """Return how many times the independent replies are needed in dialogues of `size` replies.

    1 + (size - 1) ICC (Kish 1965), at least 1: a correlation below 0 is taken for chance. Where it
    is nan the result is `size`, the worst.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"dialogues of {size} replies; expected at least 1")
    return 1 + (size - 1) * (1.0 if math.isnan(correlation) else max(0.0, correlation))


def independent_sample_size(
    rate: float, difference: float = 0.05, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Return the independent replies *per arm* that tell `rate` from `rate + difference`.

    Two-sided (Fleiss, Levin & Paik 2003, ch. 4): the normal approximation with pooled variance
    under equality, without correction for continuity.

    Raises:
        ValueError: rates outside 0..1, no difference, a power outside `alpha`/2..1, or an alpha
            outside 0..1.
    """
    changed = rate + difference
    if not (0 <= rate <= 1 and 0 <= changed <= 1 and difference):
        raise ValueError(f"rates {rate} and {changed}; expected two different ones in 0..1")
    if not 0 < alpha / 2 < power < 1 or alpha >= 1:
        raise ValueError(
            f"power {power} at alpha {alpha}; expected 0 < alpha < 1 and alpha / 2 < power < 1"
        )
    middle = (rate + changed) / 2
    equal = NormalDist().inv_cdf(1 - alpha / 2) * math.sqrt(2 * middle * (1 - middle))
    apart = NormalDist().inv_cdf(power) * math.sqrt(rate * (1 - rate) + changed * (1 - changed))
    return math.ceil(((equal + apart) / difference) ** 2)


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What an evaluation needs *per arm* to show a difference, and what it was computed from.

    `independent_replies` would do if they were independent; `dialogues` of the measured length do.
    """

    independent_replies: int
    dialogues: int
    correlation: JsonFloat
    design_effect: float


def required_sample_size(
    replies: Iterable[Reply], difference: float = 0.05, power: float = 0.8, alpha: float = 0.05
) -> SampleSize | None:
    """Return the dialogues that show `difference` from the rate of these replies.

    `independent_sample_size`, inflated by the `design_effect`. From rates too near the end for
    `difference`, the difference in the other direction. For dialogues of unequal length the size in
    the design effect is the mean weighted by length (Donner & Klar 2000). An upper bound: arms on
    the same dialogues are compared in pairs, which tells more. None without a measured reply.

    Raises:
        ValueError: as `independent_sample_size`.
    """
    sums = list(_sums(replies).values())
    if not sums:
        return None
    hits, n = sum(h for h, _ in sums), sum(m for _, m in sums)
    if not 0 <= hits / n + difference <= 1:
        difference = -difference
    independent = independent_sample_size(hits / n, difference, power, alpha)
    correlation = _intraclass_correlation(sums)
    effect = design_effect(sum(m * m for _, m in sums) / n, correlation)
    dialogues = math.ceil(independent * effect * len(sums) / n)
    return SampleSize(independent, dialogues, correlation, effect)


def distinct_n(replies: Iterable[Reply], n: int) -> float:
    """Return different n-grams of words over all n-grams, pooled over the replies: "distinct-n".

    Li et al. 2016, who divide by the words. Words are as in `gatt.text`: lowercase, no punctuation;
    an n-gram does not reach over two replies. It falls with the length of the text: compare arms of
    like length only. nan where there is no n-gram.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"{n}-grams; expected n of at least 1")
    grams: list[tuple[str, ...]] = []
    for reply in replies:
        if reply.finish != "context":
            tokens = words(reply.text)
            grams += zip(*(tokens[start:] for start in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else math.nan
