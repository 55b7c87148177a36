"""Intervals, noise floors and verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import stats
from attnbench.stats import Floor, Interval, Verdict

TIMES = st.floats(1e-6, 1e3)
SAMPLES = st.lists(TIMES, min_size=1, max_size=30)


@given(SAMPLES)
def test_quartiles_and_interval_hold_the_median(samples):
    for interval in (stats.quartiles(samples), stats.median_interval(samples)):
        assert min(samples) <= interval.low <= interval.value <= interval.high <= max(samples)
        assert interval.value == pytest.approx(np.median(samples))


def test_median_interval_covers_the_median_as_often_as_it_says():
    random = np.random.default_rng(3)
    covered = [i.low <= 1.0 <= i.high for i in (stats.median_interval(random.lognormal(0, 0.3, 25)) for _ in range(1000))]
    assert 0.93 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_samples_have_no_half_width(count):
    assert stats.relative_half_width([1.0] * count) == math.inf


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (100, 1.984)])
def test_t_quantile_agrees_with_the_printed_table(freedom, expected):
    assert stats._t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-3)


@given(st.lists(TIMES, min_size=2, max_size=12), st.lists(TIMES, min_size=2, max_size=12), st.floats(0.01, 100))
def test_ratio_follows_its_scale(a, b, factor):
    base, scaled = stats.ratio(a, b, resamples=50), stats.ratio(a, [x * factor for x in b], resamples=50)
    assert base.low <= base.value * (1 + 1e-9)
    assert base.value <= base.high * (1 + 1e-9)
    assert base.value == pytest.approx(np.median(b) / np.median(a))
    assert scaled.value == pytest.approx(base.value * factor)


@pytest.mark.parametrize("count", [3, 5, 20, 100])
def test_equal_distributions_separate_in_at_most_one_case_in_twenty(count):
    random = np.random.default_rng(count)
    draws = ((random.lognormal(0, 0.05, count), random.lognormal(0, 0.05, count)) for _ in range(400))
    verdicts = [stats.verdict(stats.ratio(a, b, resamples=400, seed=i), None) for i, (a, b) in enumerate(draws)]
    assert np.mean([v is not Verdict.NOT_SEPARABLE for v in verdicts]) <= 0.05


def test_resampled_measurement_does_not_separate_from_itself():
    random = np.random.default_rng(0)
    measured = 1e-3 * (1 + 0.02 * random.exponential(size=60))
    noise = stats.floor((np.median(random.choice(measured, 30)), np.median(random.choice(measured, 30))) for _ in range(20))
    pairs = [(random.choice(measured, 30), random.choice(measured, 30)) for _ in range(300)]
    apart = [stats.verdict(stats.ratio(a, b, resamples=400), noise) is not Verdict.NOT_SEPARABLE for a, b in pairs]
    assert np.mean(apart) <= 0.05


@pytest.mark.parametrize(("factor", "expected"), [(0.8, Verdict.FASTER), (1.25, Verdict.SLOWER), (1.02, Verdict.NOT_SEPARABLE)])
def test_real_differences_separate_and_those_within_the_floor_do_not(factor, expected):
    random = np.random.default_rng(1)
    a, b = random.lognormal(0, 0.002, 30), factor * random.lognormal(0, 0.002, 30)
    assert stats.verdict(stats.ratio(a, b), Floor(0.03, 4)) is expected
    assert stats.verdict(stats.ratio(a, b), None) is not Verdict.NOT_SEPARABLE


def test_verdict_needs_the_whole_interval_outside_the_band():
    noise = Floor(0.1, 3)
    assert stats.verdict(Interval(0.8, 0.85, 0.92), noise) is Verdict.NOT_SEPARABLE
    assert stats.verdict(Interval(0.8, 0.85, 0.90), noise) is Verdict.FASTER
    assert stats.verdict(Interval(1.09, 1.2, 1.3), noise) is Verdict.NOT_SEPARABLE
    assert stats.verdict(Interval(1.11, 1.2, 1.3), noise) is Verdict.SLOWER


def test_a_single_sample_separates_nothing():
    assert stats.verdict(stats.ratio([1.0], [1000.0]), None) is Verdict.NOT_SEPARABLE


def test_floor_of_few_pairs_allows_for_how_few_they_are():
    assert stats.floor([]) is None
    few = stats.floor([(1.0, 1.01), (1.03, 1.0)])
    assert few is not None
    assert few.pairs == 2
    assert few.relative == pytest.approx(math.expm1(4.303 * math.sqrt((math.log(1.01) ** 2 + math.log(1.03) ** 2) / 2)), rel=1e-3)
    heavy = stats.floor([(1.0, 1.0)] * 18 + [(1.0, 2.0)])
    assert heavy is not None
    assert heavy.relative == pytest.approx(1.0), "never less than the largest difference seen"


def test_floor_of_many_pairs_is_a_percentile():
    many = stats.floor([(1.0, 1.01)] * 99 + [(1.0, 2.0)])
    assert many is not None
    assert many.relative == pytest.approx(0.01)
    assert str(many) == "1.0% over 100 A/A pairs"


def test_floor_near_a_time_asks_cells_of_like_duration():
    pairs = [(1e-4, 1.2e-4), (2e-4, 2.1e-4), (1e-2, 1.01e-2), (1.5e-2, 1.5e-2), (2e-2, 2.04e-2), (1.0, 1.001)]
    assert stats.floor(pairs[:2] + pairs[2:4], 1.3e-2) == stats.floor(pairs[1:4])
    assert stats.floor(pairs, 1e-4) == stats.floor(pairs[:3])
    assert stats.floor(pairs[:1], 1.0) == stats.floor(pairs[:1])


def test_floor_of_short_calls_has_what_a_host_adds_to_longer_ones():
    """Delays of 0.2 ms, seen on calls of 0.6 ms, are 200% of calls of 0.1 ms like which none was delayed."""
    pairs = [(1e-4, 1.01e-4)] * 3 + [(5e-4, 7e-4), (7e-4, 5e-4), (6e-4, 8e-4)]
    near = stats.floor(pairs, 1e-4)
    assert near is not None
    assert near.relative >= 2.0
    assert stats.floor(pairs, 1e-2) == stats.floor(pairs[3:])
    long = stats.floor(pairs + [(1.0, 1.002)] * 3, 1.0)
    assert long is not None
    assert long.relative < 0.01


@pytest.mark.parametrize("count", [2, 3, 8, 19])
def test_one_more_normal_pair_exceeds_the_floor_of_few_in_at_most_one_case_in_twenty(count):
    random = np.random.default_rng(count)
    draws = np.exp(0.1 * random.standard_normal((2000, count + 1)))
    floors = [stats.floor((1.0, x) for x in row[1:]) for row in draws]
    beyond = [f is not None and max(x, 1 / x) - 1 > f.relative for x, f in zip(draws[:, 0], floors, strict=True)]
    assert np.mean(beyond) <= 0.06
