"""The curve of a method over a baseline against log N: its points, with their uncertainty, and where it falls through 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench import frame, stats
from attnbench.metrics import METRICS
from attnbench.stats import Interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from attnbench.stats import Floor, Verdict

    Row = Mapping[str, Any]
    Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One length at which both sides were measured."""

    n: int
    value: float
    """log of method over baseline"""
    draws: Draws | None
    """bootstrap draws of it; None where one side has a single sample"""
    floor: Floor | None

    @property
    def band(self) -> float:
        """Half the width of the A/A band, as a log ratio."""
        return math.log1p(self.floor.relative) if self.floor else 0.0

    @property
    def ratio(self) -> Interval:
        """Method over baseline with its 95% interval."""
        if self.draws is None:
            return Interval(0.0, math.exp(self.value), math.inf)
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return Interval(math.exp(low), math.exp(self.value), math.exp(high))

    @property
    def verdict(self) -> Verdict:
        """What the method is, seen from the baseline."""
        return stats.verdict(self.ratio, self.floor)


def point(own: Row | None, base: Row | None, metric: str, again: Sequence[tuple[float, float]], n: int) -> Point | None:
    """The two sides at one length; None where either was not measured."""
    if own is None or base is None or own["status"] != "ok" or base["status"] != "ok":
        return None
    if METRICS[metric].of_time is not None and not (frame.timed(own) and frame.timed(base)):
        return None
    if METRICS[metric].of_time is None:
        a, b = (float(row.get(METRICS[metric].column) or math.nan) for row in (base, own))
        value = math.log(b / a) if a > 0 and b > 0 else math.nan
        return None if math.isnan(value) else Point(n, value, np.full(1, value), None)  # memory repeats to the byte
    a, b = base["samples_s"], own["samples_s"]
    draws = stats.log_ratios(a, b, seed=n)
    return Point(n, math.log(stats.median(b) / stats.median(a)), draws, stats.floor(again, min(base["time_s"], own["time_s"])))


def length(points: Sequence[Point]) -> Interval:
    """Where log ratio against log N last falls through zero, with its 95% interval.

    The interval comes from bootstrap draws of the whole curve. Its ends are where the draws leave the A/A band: the low one is the
    2.5th percentile of crossings of the band's upper edge, the high one the 97.5th of its lower edge.
    """
    x = np.log([p.n for p in points])
    band = np.array([p.band for p in points])
    size = max(len(p.draws) for p in points if p.draws is not None)
    anything = np.where(np.arange(size) % 2, np.inf, -np.inf)  # a single sample may lie anywhere
    curves = np.stack([anything if p.draws is None else np.resize(p.draws, size) for p in points], 1)
    at = float(_crossings(x, np.array([[p.value for p in points]]))[0])
    low = np.quantile(_crossings(x, curves - band), 0.025, method="lower")
    high = np.quantile(_crossings(x, curves + band), 0.975, method="higher")
    return Interval(*(math.exp(v) for v in (min(low, at), at, max(high, at))))


def _crossings(x: Draws, curves: Draws) -> Draws:
    """The x from which each piecewise linear curve `[R, L]` stays below zero: the first x where it always is, infinity where never."""
    above = curves >= 0
    last = np.where(above.any(1), len(x) - 1 - above[:, ::-1].argmax(1), -1)
    i = last.clip(0, len(x) - 2)
    y0, y1 = (np.take_along_axis(curves, at[:, None], 1)[:, 0] for at in (i, i + 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.isinf(y0), 1.0, np.where(np.isinf(y1), 0.0, y0 / (y0 - y1)))  # towards the side that is known
    found = x[i] + (x[i + 1] - x[i]) * share
    return np.asarray(np.where(last < 0, x[0], np.where(last == len(x) - 1, np.inf, found)))
