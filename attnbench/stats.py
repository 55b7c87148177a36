"""Statistics of raw samples: medians, intervals, noise floors and three-way verdicts."""

from __future__ import annotations

import math
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


class Interval(NamedTuple):
    """A value and the interval that holds it with the stated confidence."""

    low: float
    value: float
    high: float


class Verdict(StrEnum):
    """Answer of a comparison."""

    FASTER = "faster"
    SLOWER = "slower"
    NOT_SEPARABLE = "not separable"


def median(samples: Sequence[float] | NDArray[np.float64]) -> float:
    """Median."""
    return float(np.median(np.asarray(samples, dtype=float)))


def quartiles(samples: Sequence[float]) -> Interval:
    """First quartile, median, third quartile."""
    low, mid, high = np.quantile(np.asarray(samples, dtype=float), [0.25, 0.5, 0.75])
    return Interval(float(low), float(mid), float(high))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval:
    """Distribution-free interval of the median from order statistics (normal approximation of the binomial).

    With too few samples for the confidence it is the whole range.
    """
    ordered = np.sort(np.asarray(samples, dtype=float))
    n = len(ordered)
    z = _normal_quantile(0.5 + confidence / 2)
    half = z * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return Interval(float(ordered[low]), float(np.median(ordered)), float(ordered[high]))


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def relative_half_width(samples: Sequence[float]) -> float:
    """Half the width of the median's 95% interval, as a share of the median; infinite below three samples."""
    if len(samples) < 3:
        return math.inf
    interval = median_interval(samples)
    return (interval.high - interval.low) / 2 / interval.value if interval.value > 0 else math.inf


class Floor(NamedTuple):
    """How far apart two measurements of the very same cell come out: the least difference that means anything."""

    relative: float
    """share of the time; `floor` says which quantile of the pairs it is"""
    pairs: int
    """A/A pairs it was taken from"""

    def __str__(self) -> str:
        return f"{self.relative:.1%} over {self.pairs} A/A {'pair' if self.pairs == 1 else 'pairs'}"


FLOOR = (
    "The noise floor is how far apart two measurements of the very same cell came out: far for short calls, which the host that launches "
    "them paces; the suite graph leaves the host out."
)
"""What the number means, in a sentence for whoever meets it first."""

_PACED_S = 2e-3
"""seconds below which launches pace a call rather than what is launched"""
MANY_PAIRS = 20
"""From this many A/A pairs on the floor is their 95th percentile; fewer say less, and the floor must allow for it."""


def floor(pairs: Iterable[tuple[float, float]], near: float | None = None) -> Floor | None:
    """Noise floor from `(time, time of the same cell measured again)`: a bound on `max / min - 1` of 19 pairs in 20; None without pairs.

    Noise depends on how long a call takes: short ones are paced by the host. With `near`, a time, only the pairs within a factor
    of 2 of it count, and never fewer than the three of the most similar duration. A host's delays add to a short call whatever its
    length: below 2 ms the differences of pairs within a factor of 8, where there are three, are a floor as well over `near`, and
    the higher one counts.
    """
    pairs = list(pairs)
    if not pairs:
        return None
    if near is None:
        return _bound([abs(math.log(a / b)) for a, b in pairs])
    ranked = sorted((abs(math.log(math.sqrt(a * b) / near)), a, b) for a, b in pairs)
    relative = _bound([abs(math.log(a / b)) for i, (far, a, b) in enumerate(ranked) if i < 3 or far <= math.log(2)])
    added = [math.log1p(abs(a - b) / near) for far, a, b in ranked if far <= math.log(8) and max(near, min(a, b)) < _PACED_S]
    return max(relative, _bound(added), key=lambda f: f.relative) if len(added) >= 3 else relative


def _bound(apart: Sequence[float]) -> Floor:
    """Of log ratios: their 95% quantile; of fewer than `MANY_PAIRS` the largest, or the 95% prediction limit of one more that is normal.

    That limit is `t(0.975, pairs)` times their root mean square.
    """
    if len(apart) >= MANY_PAIRS:
        return Floor(math.expm1(float(np.quantile(apart, 0.95))), len(apart))
    spread = math.sqrt(math.fsum(x * x for x in apart) / len(apart))
    return Floor(math.expm1(max(*apart, _t_quantile(0.975, len(apart)) * spread)), len(apart))


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """`median(b) / median(a)` with its bootstrap interval.

    The percentile interval of the log ratio is widened about the estimate by `t / z * sqrt(n / (n - 1))`, because plain
    percentiles are too narrow for few samples (Hesterberg 2015, https://doi.org/10.1080/00031305.2015.1089789, section 3.3).
    With a single sample on either side nothing is known: the interval is all positive numbers.
    """
    return _ratio(tuple(a), tuple(b), confidence, resamples, seed)


@lru_cache(maxsize=4096)
def _ratio(a: tuple[float, ...], b: tuple[float, ...], confidence: float, resamples: int, seed: int) -> Interval:
    """Of the same samples the same: tables, pages and summaries ask again."""
    value = median(b) / median(a)
    draws = log_ratios(a, b, confidence, resamples, seed)
    if draws is None:
        return Interval(0.0, value, math.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(math.exp(low), value, math.exp(high))


def log_ratios(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> NDArray[np.float64] | None:
    """Bootstrap draws of `log(median(b) / median(a))`, widened as `ratio` says; None with a single sample on either side."""
    x, y = (np.asarray(s, dtype=float) for s in (a, b))
    fewest, centre = min(len(x), len(y)), math.log(median(y) / median(x))
    if fewest < 2:
        return None
    random = np.random.default_rng(seed)
    medians = [np.median(s[random.integers(0, len(s), (resamples, len(s)))], axis=1) for s in (x, y)]
    tail = (1 - confidence) / 2
    widen = _t_quantile(1 - tail, fewest - 1) / _normal_quantile(1 - tail) * math.sqrt(fewest / (fewest - 1))
    return np.asarray(centre + widen * (np.log(medians[1] / medians[0]) - centre), dtype=np.float64)


def _t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t: closed forms for 1 and 2 degrees of freedom, else Cornish-Fisher (Abramowitz and Stegun 26.7.5)."""
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = _normal_quantile(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def verdict(interval: Interval, noise: Floor | None) -> Verdict:
    """What the ratio `time b / time a` says of b: faster or slower where the whole interval lies outside `1 +- floor`.

    The band is `[1 / (1 + floor), 1 + floor]`, symmetric in the two sides; without a measured floor it is 1 alone.
    """
    band = 1 + (noise.relative if noise else 0.0)
    if interval.high < 1 / band:
        return Verdict.FASTER
    return Verdict.SLOWER if interval.low > band else Verdict.NOT_SEPARABLE
