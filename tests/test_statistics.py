"""Our statistics against scipy, statsmodels and numpy, and at edges where those have no answer."""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import CensoredData, bootstrap, ecdf
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import (
    proportion_confint,
    proportion_effectsize,
    samplesize_proportions_2indep_onetail,
)

from pipeline.evaluation.rates import adherence, wilson
from pipeline.evaluation.statistics import (
    Lifetime,
    design_effect,
    distinct_n,
    independent_sample_size,
    kaplan_meier,
    lifetimes,
    paired_bootstrap,
    required_sample_size,
)
from pipeline.records import FinishReason, Reply

Counts = npt.NDArray[np.float64]
LIVES = st.lists(
    st.builds(Lifetime, turn=st.integers(1, 20), broken=st.booleans()), min_size=1, max_size=60
)


def arm(rows: list[list[int]], name: str = "base", measured: int = 99) -> list[Reply]:
    """Return a dialogue for each row, with 1 for an adherent reply.

    After the turn `measured`, turn 1 has left the context window.
    """
    return [
        Reply(
            arm=name,
            dialogue=f"d{d}",
            turn=turn,
            text="",
            prompt_tokens=1,
            tokens=1,
            finish="stop" if turn <= measured else "context",
            obeys=bool(hit),
            defect="",
        )
        for d, row in enumerate(rows)
        for turn, hit in enumerate(row, 1)
    ]


def replies_of(*texts: str, defect: str = "", finish: FinishReason = "stop") -> list[Reply]:
    """Return the replies of one dialogue."""
    return [
        Reply(
            arm="base",
            dialogue="d",
            turn=turn,
            text=text,
            prompt_tokens=1,
            tokens=1,
            finish=finish,
            obeys=True,
            defect=defect,
        )
        for turn, text in enumerate(texts, 1)
    ]


class Arms(NamedTuple):
    """Two arms as rows of dialogues."""

    base: list[list[int]]
    tuned: list[list[int]]


def correlated(dialogues: int, seed: int, gain: float = 0.0, spread: float = 0.35) -> Arms:
    """Return two arms of dialogues of 5 to 20 turns, the second better by `gain`.

    The replies of a dialogue share its rate.
    """
    random = Random(seed)
    arms = Arms([], [])
    for _ in range(dialogues):
        turns, rate = random.randint(5, 20), 0.45 + random.uniform(-spread, spread)
        for rows, p in zip(arms, (rate, rate + gain), strict=True):
            rows.append([int(random.random() < p) for _ in range(turns)])
    return arms


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_wilson(n: int, share: float) -> None:
    hits = round(share * n)
    assert (wilson(hits, n).low, wilson(hits, n).high) == pytest.approx(
        proportion_confint(hits, n, method="wilson"), abs=1e-12
    )
    # Exactly, where the formula has rounding in it.
    assert (wilson(0, n).low, wilson(n, n).high) == (0.0, 1.0)


# --- paired bootstrap


@pytest.mark.parametrize(("dialogues", "seed"), [(24, 1), (60, 2)])
def test_bootstrap_is_that_of_scipy_on_pairs_of_dialogues(dialogues: int, seed: int) -> None:
    base, tuned = correlated(dialogues, seed, gain=0.2)
    sums = [np.array([f(row) for row in rows]) for rows in (tuned, base) for f in (sum, len)]

    def difference(*samples: Counts, axis: int = -1) -> Counts:
        tuned_hits, tuned_n, base_hits, base_n = (sample.sum(axis) for sample in samples)
        return np.asarray(tuned_hits / tuned_n - base_hits / base_n)

    expected = bootstrap(
        sums, difference, paired=True, method="percentile", n_resamples=20_000, batch=500, rng=seed
    )
    result = paired_bootstrap(arm(base), arm(tuned, "tuned"), resamples=20_000, seed=seed)
    assert result.difference == pytest.approx(difference(*sums))
    assert result.dialogues == dialogues
    # An end of the interval of 20,000 resamples has 0.019 of the bootstrap's standard error. Allow
    # four times that of two such ends.
    error = 4 * math.sqrt(2) * 0.019 * expected.standard_error
    assert result.low == pytest.approx(expected.confidence_interval.low, abs=error)
    assert result.high == pytest.approx(expected.confidence_interval.high, abs=error)


def test_bootstrap_by_hand() -> None:
    # Of two dialogues, (0, 0), (0, 1), (1, 0), (1, 1) are drawn equally often; the ends are those
    # of one dialogue twice.
    result = paired_bootstrap(arm([[1, 0, 0, 0], [0, 0]]), arm([[1, 1, 1, 0], [0, 1]], "tuned"))
    assert (result.difference, result.low, result.high) == (0.5, 0.5, 0.5)
    result = paired_bootstrap(arm([[1, 0, 0, 0], [0, 0]]), arm([[1, 0, 0, 0], [1, 1]], "tuned"))
    assert result.difference == pytest.approx(1 / 3)
    assert (result.low, result.high) == (0.0, 1.0)


def test_bootstrap_is_the_same_for_the_same_seed_in_any_order() -> None:
    base, tuned = (
        arm(rows, name) for rows, name in zip(correlated(12, 3), ("base", "tuned"), strict=True)
    )
    result = paired_bootstrap(base, tuned, seed=5)
    assert result == paired_bootstrap(base[::-1], iter(tuned[::-1]), seed=5)
    assert result != paired_bootstrap(base, tuned, seed=6)
    assert result.difference == -paired_bootstrap(tuned, base).difference


def test_bootstrap_compares_what_was_measured_in_both_arms() -> None:
    base, tuned = (
        arm([[1, 0, 1], [0, 0, 1]], measured=2),
        arm([[1, 1, 1], [1, 1, 0], [0, 0, 0]], "tuned", measured=2),
    )
    result = paired_bootstrap(base, tuned)
    assert (result.difference, result.dialogues) == (0.75, 2)
    common = [reply for reply in tuned if reply.dialogue != "d2"]
    assert (
        result.difference
        == adherence(common, lambda r: 0)[0].value - adherence(base, lambda r: 0)[0].value
    )


def test_bootstrap_of_too_little_says_nothing() -> None:
    nothing = paired_bootstrap([], arm([[1]]))
    assert math.isnan(nothing.difference)
    assert (nothing.low, nothing.high, nothing.dialogues) == (-1.0, 1.0, 0)
    single = paired_bootstrap(arm([[1, 0]]), arm([[1, 1]], "tuned"))
    assert (single.difference, single.low, single.high, single.dialogues) == (0.5, -1.0, 1.0, 1)
    for level, expected in (([1, 1], 0.0), ([0, 0], 1.0)):
        alike = paired_bootstrap(arm([level] * 5), arm([[1, 1]] * 5, "tuned"))
        assert (alike.difference, alike.low, alike.high) == (expected, expected, expected)
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap([], [], resamples=1)


def test_replies_of_two_arms_are_refused() -> None:
    both = arm([[1, 0]]) + arm([[1, 1]], "tuned")
    for function in (
        lifetimes,
        required_sample_size,
        lambda replies: paired_bootstrap(replies, []),
    ):
        with pytest.raises(ValueError, match="two replies in turn 1 of dialogue 'd0'"):
            function(both)


# --- survival


def test_lifetimes() -> None:
    assert lifetimes(arm([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])[::-1]) == {
        "d0": Lifetime(turn=2, broken=True),
        "d1": Lifetime(turn=4, broken=False),
        "d2": Lifetime(turn=1, broken=True),
    }
    # What has left the window is not a break; a dialogue without a measured reply is left out.
    assert lifetimes(arm([[1, 1, 0, 0]], measured=2)) == {"d0": Lifetime(turn=2, broken=False)}
    assert lifetimes(arm([[1, 1]], measured=0)) == lifetimes([]) == {}
    # A reply that obeys but has a defect is broken.
    assert lifetimes(replies_of("Ahoy! Ahoy!", defect="empty")) == {
        "d": Lifetime(turn=1, broken=True)
    }


@given(lives=LIVES)
def test_kaplan_meier_is_that_of_statsmodels(lives: list[Lifetime]) -> None:
    assume(any(life.broken for life in lives))
    expected = SurvfuncRight([life.turn for life in lives], [int(life.broken) for life in lives])
    result = [step for step in kaplan_meier(lives).steps if step.broken]
    assert [step.turn for step in result] == list(expected.surv_times)
    assert [step.at_risk for step in result] == list(expected.n_risk)
    assert [step.broken for step in result] == list(expected.n_events)
    assert [step.value for step in result] == pytest.approx(list(expected.surv_prob), abs=1e-12)


@given(lives=LIVES)
@pytest.mark.filterwarnings("ignore:.*confidence interval.*undefined", "ignore::RuntimeWarning")
def test_kaplan_meier_and_its_interval_are_those_of_scipy(lives: list[Lifetime]) -> None:
    times = np.array([life.turn for life in lives])
    expected = ecdf(
        CensoredData.right_censored(times, np.array([not life.broken for life in lives]))
    ).sf
    between = expected.confidence_interval(method="log-log")
    steps = kaplan_meier(lives).steps
    assert [step.value for step in steps] == pytest.approx(
        expected.evaluate([step.turn for step in steps]), abs=1e-12
    )
    for step in steps:
        low, high = float(between.low.evaluate(step.turn)), float(between.high.evaluate(step.turn))
        if 0 < step.value < 1:
            assert (step.low, step.high) == pytest.approx((low, high), abs=1e-9)
        assert 0 <= step.low <= step.value <= step.high <= 1
        assert step.low < step.high


@given(lives=LIVES)
def test_median_is_the_first_turn_at_one_half_or_below(lives: list[Lifetime]) -> None:
    result = kaplan_meier(lives)
    assert [step.turn for step in result.steps] == list(
        range(1, max(life.turn for life in lives) + 1)
    )
    assert [step.turn for step in result.steps if step.value <= 0.5][:1] == (
        [result.median] if result.median else []
    )


def test_median_where_a_product_of_floats_stops_above_one_half() -> None:
    assert math.prod((24 - broken - 1) / (24 - broken) for broken in range(12)) > 0.5
    assert kaplan_meier([Lifetime(turn=turn, broken=True) for turn in range(1, 25)]).median == 12


def test_survival_at_its_edges() -> None:
    nothing = kaplan_meier([])
    assert (nothing.dialogues, nothing.steps, nothing.median) == (0, (), None)

    unbroken = kaplan_meier(lifetimes(arm([[1] * 20] * 12)).values())
    assert (unbroken.dialogues, unbroken.median, len(unbroken.steps)) == (12, None, 20)
    # No break among twelve does not prove none: an interval without width would claim so.
    assert {(s.value, s.low, s.high) for s in unbroken.steps} == {(1.0, wilson(12, 12).low, 1.0)}

    censored = kaplan_meier(
        [Lifetime(turn=3, broken=False)] * 4 + [Lifetime(turn=5, broken=False)] * 2
    )
    assert censored.median is None
    assert [(s.at_risk, s.value, s.low) for s in censored.steps][2:4] == [
        (6, 1.0, wilson(6, 6).low),
        (2, 1.0, wilson(2, 2).low),
    ]

    broken = kaplan_meier(lifetimes(arm([[0] * 20] * 12)).values())
    (step,) = broken.steps
    assert (broken.median, step.at_risk, step.broken, step.value, step.low, step.high) == (
        1,
        12,
        12,
        0.0,
        0.0,
        wilson(0, 12).high,
    )

    # The last of many: the interval of one dialogue would reach 0.79, above the turn before.
    last = kaplan_meier([Lifetime(turn=1, broken=True)] * 30 + [Lifetime(turn=2, broken=True)])
    assert last.steps[1].high == last.steps[0].high < wilson(0, 1).high

    single = kaplan_meier([Lifetime(turn=2, broken=True)])
    assert (single.median, [s.value for s in single.steps]) == (2, [1.0, 0.0])


# --- correlation within a dialogue, and how many dialogues are enough


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=2, max_size=12))
def test_the_correlation_is_that_of_an_analysis_of_variance(rows: list[list[int]]) -> None:
    k, n = len(rows), sum(map(len, rows))
    everything = np.concatenate([np.array(row, float) for row in rows])
    assume(n > k and everything.std() > 0)
    means = np.concatenate([np.full(len(row), np.mean(row)) for row in rows])
    between = np.sum((means - everything.mean()) ** 2) / (k - 1)
    within = np.sum((everything - means) ** 2) / (n - k)
    size = np.mean([len(row) for row in rows]) - np.var([len(row) for row in rows], ddof=1) / n
    expected = (between - within) / (between + (size - 1) * within)
    assert correlation(rows) == pytest.approx(expected, abs=1e-9)


def correlation(rows: list[list[int]], measured: int = 99) -> float:
    result = required_sample_size(arm(rows, measured=measured))
    assert result
    return result.correlation


def test_the_correlation_at_its_edges() -> None:
    assert correlation([[1, 1, 1], [0, 0, 0]]) == 1.0
    assert correlation([[1, 0], [0, 1]]) == -1.0
    assert correlation([[1, 1, 0], [0, 0, 1]], measured=2) == 1.0
    for rows in ([[1, 0, 1]], [[1], [0], [1]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]):
        assert math.isnan(correlation(rows))


def test_design_effect() -> None:
    assert design_effect(20, 0.1) == pytest.approx(2.9)
    assert design_effect(20, -0.02) == 1
    assert design_effect(20, math.nan) == design_effect(20, 1.0) == 20
    with pytest.raises(ValueError, match="at least 1"):
        design_effect(0.5, 0.1)


RATES = [(0.0, 0.05), (0.25, 0.05), (0.5, 0.05), (0.95, 0.05), (0.5, -0.2), (0.1, 0.9), (0.3, 0.4)]


@pytest.mark.parametrize(("rate", "difference"), RATES)
@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.95, 0.01)])
def test_independent_sample_size_is_the_closed_form_of_statsmodels(
    rate: float, difference: float, power: float, alpha: float
) -> None:
    expected = samplesize_proportions_2indep_onetail(difference, rate, power, alpha=alpha)
    assert independent_sample_size(rate, difference, power, alpha) == math.ceil(expected)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75])
def test_independent_sample_size_is_near_to_that_by_the_arcsine(rate: float) -> None:
    expected = NormalIndPower().solve_power(
        proportion_effectsize(rate + 0.05, rate), power=0.8, alpha=0.05
    )
    assert independent_sample_size(rate) == pytest.approx(expected, rel=0.01)


def test_independent_sample_size_refuses_invalid_arguments() -> None:
    assert independent_sample_size(0.5, 0.05) == 1565
    for rate, difference in ((0.97, 0.05), (0.02, -0.05), (0.5, 0.0), (1.2, -0.5)):
        with pytest.raises(ValueError, match="expected two different ones"):
            independent_sample_size(rate, difference)
    for power, alpha in ((1.0, 0.05), (0.02, 0.05), (0.8, 0.0), (0.8, 1.0)):
        with pytest.raises(ValueError, match="power"):
            independent_sample_size(0.5, 0.05, power, alpha)


def test_sample_size() -> None:
    base, _ = correlated(40, 7)
    replies, lengths = arm(base), np.array([len(row) for row in base])
    result = required_sample_size(replies)
    assert result is not None
    assert result.independent_replies == independent_sample_size(
        sum(map(sum, base)) / lengths.sum()
    )
    assert result.correlation > 0.05
    weighted = np.average(lengths, weights=lengths)
    assert result.design_effect > 1.5
    assert result.design_effect == pytest.approx(1 + (weighted - 1) * result.correlation)
    assert result.dialogues == math.ceil(
        result.independent_replies * result.design_effect / lengths.mean()
    )
    assert all(type(number) is int for number in (result.independent_replies, result.dialogues))
    wider = required_sample_size(replies, difference=0.1)
    assert wider is not None and wider.independent_replies == pytest.approx(
        result.independent_replies / 4, rel=0.02
    )
    surer = required_sample_size(replies, power=0.95, alpha=0.01)
    assert surer is not None and surer.independent_replies == independent_sample_size(
        sum(map(sum, base)) / lengths.sum(), 0.05, 0.95, 0.01
    )


def test_sample_size_at_its_edges() -> None:
    assert required_sample_size([]) is None
    assert required_sample_size(arm([[1, 1]], measured=0)) is None
    # All alike, or one dialogue: the correlation is unknown, and a dialogue counts as one reply.
    for rows in ([[1] * 20] * 12, [[0] * 20] * 12, [[0] * 20], [[1]]):
        result = required_sample_size(arm(rows))
        assert result is not None and math.isnan(result.correlation)
        assert result.dialogues == result.independent_replies == independent_sample_size(0.0)
    # Each dialogue holds or fails as a unit, which also makes it count as one reply.
    result = required_sample_size(arm([[1] * 20, [0] * 20] * 6))
    assert result is not None and (result.independent_replies, result.dialogues) == (1565, 1565)
    apart = required_sample_size(arm([[1, 0]] * 6))
    assert apart is not None and (
        apart.independent_replies,
        apart.dialogues,
        apart.design_effect,
    ) == (
        1565,
        783,
        1.0,
    )


# --- variety of the text


def test_distinct_n() -> None:
    replies = replies_of("The cat, the cat sat.", "Sat the dog?")
    assert distinct_n(replies, 1) == 4 / 8
    # the cat, cat the, (the cat), cat sat | sat the, the dog; not "sat sat" across two replies.
    assert distinct_n(replies, 2) == 5 / 6
    assert distinct_n(replies, 3) == 1.0
    assert distinct_n([*replies, *replies_of("the cat", finish="context")], 1) == 4 / 8
    assert math.isnan(distinct_n(replies, 6))
    assert math.isnan(distinct_n([], 1))
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(replies, 0)
