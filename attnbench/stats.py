"""Statistics of raw samples: medians, intervals, noise floors and three-way verdicts."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def median(samples: Sequence[float]) -> float:
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
