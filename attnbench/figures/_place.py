"""Names beside points, placed so that they cover neither points nor each other."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

_SIZE = 5.5
_GAP = 2.0
"""Points between names side by side, and to the edge of the axes."""
Point = tuple[float, float]
_Box = tuple[float, float, float, float]


class Name(NamedTuple):
    """A text that belongs to a point, in data units."""

    text: str
    point: Point
    bold: bool
    colour: str


def annotate(axes: Axes, names: Sequence[Name], points: Sequence[Point], lines: Sequence[Sequence[Point]] = ()) -> None:
    """Write each name at the nearest free place, with a thin line where that is away from its point.

    The figure must have been laid out before. `points` are all points of the axes, named or not, and `lines` the paths of
    horizontal and vertical strokes to keep clear of, both in data units.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes stand in a figure"
    scale = figure.dpi / 72

    def place(point: Point) -> Point:
        x, y = axes.transData.transform(point)
        return float(x) / scale, float(y) / scale

    window = axes.get_window_extent()
    bounds = (window.x0 / scale + _GAP, window.y0 / scale + _GAP, window.x1 / scale - _GAP, window.y1 / scale - _GAP)
    taken = [_around(*place(p)) for p in points] + [_stroke(place(a), place(b)) for path in lines for a, b in itertools.pairwise(path)]
    for name in names:
        x, y = place(name.point)
        wide, high = _width(name), _SIZE * 1.15
        near = list(_candidates(x, y, wide, high))
        box = min([*near, *(_pushed(c, bounds) for c in near)], key=lambda c: _cost(c, taken, bounds, (x, y)))
        taken.append((box[0] - _GAP, box[1], box[2] + _GAP, box[3]))
        away = _away(box, (x, y))
        axes.annotate(
            name.text, name.point, (box[0] - x, box[1] - y), textcoords="offset points", fontsize=_SIZE, color=name.colour, zorder=4,
            fontweight="bold" if name.bold else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": name.colour, "shrinkA": 0, "shrinkB": 2} if away else None,
        )  # fmt: skip


def _width(name: Name) -> float:
    """Points that the text is wide."""
    font = FontProperties(size=_SIZE, weight="bold" if name.bold else "normal")
    return float(text_to_path.get_text_width_height_descent(name.text, font, ismath=False)[0])


def _stroke(a: Point, b: Point) -> _Box:
    return (min(a[0], b[0]) - 0.7, min(a[1], b[1]) - 0.7, max(a[0], b[0]) + 0.7, max(a[1], b[1]) + 0.7)


def _around(x: float, y: float) -> _Box:
    return (x - 3, y - 3, x + 3, y + 3)


def _candidates(x: float, y: float, wide: float, high: float) -> Iterator[_Box]:
    for away in (4, 10, 18, 27, 38, 52):
        for left, low in ((away, -high / 2), (-away - wide, -high / 2), (-wide / 2, away), (-wide / 2, -away - high),
                          (away * 0.7, away * 0.7), (away * 0.7, -away * 0.7 - high), (-away * 0.7 - wide, away * 0.7),
                          (-away * 0.7 - wide, -away * 0.7 - high)):  # fmt: skip
            yield (x + left, y + low, x + left + wide, y + low + high)


def _pushed(box: _Box, bounds: _Box) -> _Box:
    """Moved into the bounds, where it fits."""
    right = max(0.0, bounds[0] - box[0]) - max(0.0, box[2] - bounds[2])
    up = max(0.0, bounds[1] - box[1]) - max(0.0, box[3] - bounds[3])
    return (box[0] + right, box[1] + up, box[2] + right, box[3] + up)


def _cost(box: _Box, taken: Sequence[_Box], bounds: _Box, point: Point) -> float:
    """How many things are covered and with what area, then area outside the axes and what the thin line crosses, then distance."""
    covered = sum(10 + area for other in taken if (area := _overlap(box, other)))
    crossed = sum(_crosses(point, box, other) for other in taken) if _away(box, point) else 0
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _overlap(box, bounds)
    centre = ((box[0] + box[2]) / 2 - point[0]) ** 2 / 9 + ((box[1] + box[3]) / 2 - point[1]) ** 2
    return 50 * covered + 20 * outside + 500 * crossed + math.sqrt(centre)


def _away(box: _Box, point: Point) -> bool:
    """Whether a name there needs a thin line to its point."""
    (x, y) = point
    return max(box[0] - x, x - box[2], box[1] - y, y - box[3]) > 9


def _crosses(point: Point, box: _Box, other: _Box) -> bool:
    """Whether the line from the point to the middle of its name touches another box than those that the point is in."""
    if _within(point, other):
        return False
    (x, y), (u, v) = point, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return any(_within((x + (u - x) * i / 24, y + (v - y) * i / 24), other) for i in range(1, 24))


def _within(point: Point, box: _Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
