"""The taxonomy as a picture: methods on a grid of two of its dimensions, measured numbers as colour and size where there are any."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench import frame, series
from attnbench.errors import UserError, unknown
from attnbench.figures._style import COLOURS, WIDTHS, folded, length, marker, paper, wrapped
from attnbench.metrics import METRICS, add
from attnbench.metrics import better as is_better
from attnbench.taxonomy import DIMENSIONS, TITLES, Family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from attnbench.method import Method

_LINE_IN, _HEAD_IN, _SIDE_IN = 0.125, 0.36, 0.95
"""Inches of one method, of the column heads, of the row heads."""
_PLAIN = 4.2
_SIZES = (3.0, 7.0)
"""Marker sizes in points: without a number, and of the least and the largest number."""


def measured(table: pd.DataFrame, metrics: Sequence[str], n: int) -> dict[str, dict[str, float]]:
    """Metric -> method -> its best number at length n, forward, over implementations and settings. Raises `UserError`.

    Of the speeds, where there are several suites, the one with the most methods speaks: settings are not pooled.
    """
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    rows = add(frame.current(table)) if not table.empty else table
    rows = rows[(rows["status"] == "ok") & (rows["mode"] == "forward") & (rows["replicate"] == 0) & (rows["n"] == n)] if len(rows) else rows
    found = {name: _best(rows, name) for name in metrics}
    for name, values in found.items():
        if not values:
            raise UserError(f"these results hold no {name} at N = {n}: choose another --n, --results or metric")
    return found


def _best(rows: pd.DataFrame, name: str) -> dict[str, float]:
    column = METRICS[name].column
    rows = rows[rows[column].notna()] if len(rows) else rows
    if not len(rows):
        return {}
    places = rows["suite"] + "\n" + rows["device"]
    rows = rows[places == rows.groupby(places)["method"].nunique().idxmax()]
    best: dict[str, float] = {}
    for row in rows.to_dict("records"):
        method, value = str(row["method"]), float(row[column]) / METRICS[name].divide
        if method not in best or is_better(name, value, best[method]):
            best[method] = value
    return best


def data(methods: Sequence[Method], across: str, down: str, numbers: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """What is drawn, one row a method: `method`, `title`, `family`, the five dimensions, and a column for each metric."""
    for name in (across, down):
        if name not in DIMENSIONS:
            raise unknown("dimension", name, DIMENSIONS)
    if across == down:
        raise UserError(f"both axes are {across}: choose two dimensions of {', '.join(DIMENSIONS)}")
    rows: list[dict[str, Any]] = [
        {"method": m.name, "title": m.title, "family": str(m.family), **m.coordinates.as_dict()}
        | {metric: values.get(m.name, float("nan")) for metric, values in numbers.items()}
        for m in methods
    ]
    order = {name: [str(v) for v in values] for name, values in DIMENSIONS.items()}
    rows.sort(key=lambda r: (order[down].index(r[down]), order[across].index(r[across]), series.family_rank(r["family"]), str(r["title"])))
    return pd.DataFrame(rows)


def build(drawn: pd.DataFrame, across: str, down: str, *, colour: str = "", size: str = "", note: str = "") -> Figure:
    """The grid; `colour` and `size` name metrics that are columns of `drawn`."""
    columns, rows = (_used(drawn, name) for name in (across, down))
    depth = {str(row): int(part.groupby(across).size().max()) for row, part in drawn.groupby(down)}
    total = sum(depth[row] + 0.5 for row in rows)
    width, note = WIDTHS[2], wrapped(_caption(drawn, size, note), WIDTHS[2])
    foot = 0.42 + 0.1 * (note.count("\n") + 1)
    height = total * _LINE_IN + _HEAD_IN + foot
    with paper():
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((_SIDE_IN / width, foot / height, 1 - (_SIDE_IN + 0.02) / width, total * _LINE_IN / height))
        edges = _edges(drawn, across, columns)
        axes.set(xlim=(0, edges[-1]), ylim=(total, 0), xticks=[], yticks=[])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(True)
        scale, place = _colours(drawn, colour), 0.0
        for row in rows:
            axes.text(-0.6, place + (depth[row] + 0.5) / 2, folded(row, 20), fontsize=5.6, va="center", ha="right")
            for edge, column in zip(edges, columns, strict=False):
                here = _records(drawn[(drawn[down] == row) & (drawn[across] == column)])
                for i, point in enumerate(here):
                    _point(axes, (edge, place + 0.75 + i), point, scale, _marker_size(drawn, size, point))
            place += depth[row] + 0.5
            axes.axhline(place, color="#dddddd", linewidth=0.5, zorder=0)
        for left, right, column in zip(edges[:-1], edges[1:], columns, strict=True):
            axes.axvline(left, color="#dddddd", linewidth=0.5, zorder=0)
            axes.text((left + right) / 2, -0.35, folded(column, int(right - left) + 1), fontsize=5.6, va="bottom", ha="center")
        _explain(figure, drawn, colour, scale, foot / height)
        figure.text(0.005, 0.04 / height, note, fontsize=5.5, color="#444444", va="bottom", linespacing=1.25)
        figure.text(0.005, 1 - 0.05 / height, f"{TITLES[down]} (down),\n{TITLES[across]} (across)", fontsize=5.5, color="#444444", va="top")
    return figure


def _edges(drawn: pd.DataFrame, across: str, columns: Sequence[str]) -> list[float]:
    """Where columns begin, and where the last ends, in characters: each is as wide as its longest name, or its head in two lines."""
    edges = [0.0]
    for column in columns:
        names = drawn.loc[drawn[across] == column, "title"].str.len().max()
        words = max(len(word) for word in column.split())
        edges.append(edges[-1] + max(int(names) + 3.5, words + 1.5, len(column) / 2 + 1))
    return edges


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def _used(drawn: pd.DataFrame, name: str) -> list[str]:
    """The values of a dimension that some method has, in the taxonomy's order."""
    return [str(v) for v in DIMENSIONS[name] if str(v) in set(drawn[name])]


def _point(axes: Axes, at: tuple[float, float], point: Mapping[str, Any], scale: ScalarMappable | None, size: float) -> None:
    value = point.get("_colour")
    own = COLOURS[Family(point["family"])] if scale is None else "none" if pd.isna(value) else scale.to_rgba(value)
    style: dict[str, Any] = {"markerfacecolor": own, "markeredgecolor": own if scale is None else "#444444", "markeredgewidth": 0.5}
    axes.plot([at[0] + 1.2], [at[1]], marker=marker(point["method"]), markersize=size, linestyle="none", **style)
    axes.text(at[0] + 2.3, at[1], point["title"], fontsize=5.6, va="center")


def _colours(drawn: pd.DataFrame, metric: str) -> ScalarMappable | None:
    """A scale from the least to the largest number; adds the column that points are coloured by."""
    if not metric:
        return None
    values = drawn[metric]
    drawn["_colour"] = [None if pd.isna(v) else float(v) for v in values]
    low, high = float(values.min()), float(values.max())
    return ScalarMappable(LogNorm(low, high if high > low else low * 1.01), "cividis")


def _marker_size(drawn: pd.DataFrame, metric: str, point: Mapping[str, Any]) -> float:
    """Area grows with the logarithm of the number; a point without one keeps the plain size."""
    if not metric or pd.isna(point[metric]):
        return _PLAIN
    low, high = float(drawn[metric].min()), float(drawn[metric].max())
    share = 0.5 if high <= low else math.log(float(point[metric]) / low) / math.log(high / low)
    return _SIZES[0] + (_SIZES[1] - _SIZES[0]) * share


def _caption(drawn: pd.DataFrame, size: str, note: str) -> str:
    grows = f"Marker size: {METRICS[size].axis}, {drawn[size].min():.3g} to {drawn[size].max():.3g}." if size else ""
    return " ".join(part for part in (note, grows) if part)


def _explain(figure: Figure, drawn: pd.DataFrame, colour: str, scale: ScalarMappable | None, foot: float) -> None:
    """Legend of families, or a colour bar, below the grid."""
    if scale is None:
        families = [f for f in Family if str(f) in set(drawn["family"])]
        handles = [Line2D([], [], marker="s", linestyle="none", markersize=_PLAIN, color=COLOURS[f], label=str(f)) for f in families]
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.0, 0.93 * foot), ncols=len(handles), fontsize=5.6, columnspacing=1.0,
            handletextpad=0.1,
        )  # fmt: skip
    else:
        bar = figure.colorbar(scale, cax=figure.add_axes((0.15, 0.7 * foot, 0.3, 0.13 * foot)), orientation="horizontal")
        bar.ax.tick_params(labelsize=5, pad=1)
        figure.text(0.46, 0.7 * foot, f"{METRICS[colour].axis}; hollow: not measured", fontsize=5.6)


def conditions(table: pd.DataFrame, n: int) -> str:
    """What the numbers are of."""
    return f"{series.describe(table)}, N = {length(n)}, forward; the best of a method's implementations and settings."
