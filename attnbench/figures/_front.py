"""Fronts: points that no other beats in one of two quantities without losing in the other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Point = tuple[float, float]

FEW = 10
"""Up to so many approximate methods a panel every one is named in place, beyond it those on the front."""


def marked(points: Sequence[dict[str, Any]], panel: Sequence[str], place: Callable[[dict[str, Any]], Point]) -> list[dict[str, Any]]:
    """The points with `front`, each among those that share its values of `panel`; of both numbers of its `place` the smaller is better."""

    def among(p: dict[str, Any]) -> list[Point]:
        return [place(other) for other in points if all(other[name] == p[name] for name in panel)]

    def beaten(own: Point, other: Point) -> bool:
        return own != other and other[0] <= own[0] and other[1] <= own[1]

    return [{**p, "front": not any(beaten(place(p), other) for other in among(p))} for p in points]


def time_and_error(point: dict[str, Any]) -> Point:
    """Where a point of fidelity lies: all exact methods are equally accurate, since their errors are rounding."""
    return point["time_ms"], 0.0 if point["exact"] else float(point["rel_error"])


def stairs(corners: Sequence[Point]) -> list[Point]:
    """The path along a front whose points are in the order of the first number: across, then up or down."""
    return [corner for (x, y), (after, _) in itertools.pairwise(corners) for corner in ((x, y), (after, y))] + list(corners[-1:])
