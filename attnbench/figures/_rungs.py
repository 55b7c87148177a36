"""Fidelity at equal width without a clock: a row a method, from its smallest budget to its largest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnbench import series
from attnbench.figures import _panel
from attnbench.figures._style import BASELINE, WIDTHS, length, wrapped
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

_ROW_IN = 0.115
SIZES = (2.6, 3.6, 4.6)
"""Marker sizes of the smallest budget, those between, and the largest."""


def size(budget: Any, budgets: Sequence[int], fixed: str) -> float:
    """Marker size of a budget among `budgets`, ascending; of one that is `fixed`, the middle one."""
    return SIZES[1 if budget == fixed else round(2 * budgets.index(budget) / max(1, len(budgets) - 1))]


def draw(drawn: pd.DataFrame, caption: str, columns: int, fixed: str) -> Figure:
    """The figure of the rows that `attnbench.figures.equal_width.data` gives: a row of panels a profile, a column a length.

    Args:
        drawn: one row a point; those that are `exact` give the line across.
        caption: small print below.
        columns: of the page, 1 or 2.
        fixed: what stands in `budget` where a method reads what its shape gives it.
    """
    own = drawn[~drawn["exact"]]
    styles = _panel.looks(own)
    order = list(styles)
    profiles, lengths = series.panel_order(drawn["profile"].unique()), sorted(drawn["n"].unique())
    caption = wrapped(caption, WIDTHS[columns])
    height = len(profiles) * (_ROW_IN * (len(order) + 1) + 0.25) + 0.75 + 0.115 * (caption.count("\n") + 1)
    figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    grid = figure.subplots(len(profiles), len(lengths), sharex=True, sharey=True, squeeze=False)
    budgets = sorted(b for b in own["budget"].unique() if b != fixed)
    for i, profile in enumerate(profiles):
        for j, n in enumerate(lengths):
            axes = grid[i, j]
            part = drawn[(drawn["profile"] == profile) & (drawn["n"] == n)]
            _fill(axes, part, styles, lambda b: size(b, budgets, fixed))
            _panel.rules(axes, order, own)
            axes.set_title(f"{profile}, N={length(n)}", pad=3, fontweight="bold")
    first = grid.flat[0]
    first.set_xscale("log")
    _panel.plain(first.xaxis)
    _panel.row_axis(first, order)
    for axes in grid[:, 0]:
        axes.tick_params(axis="y", labelsize=5.5)
    for axes in grid[-1]:
        axes.set_xlabel(METRICS["rel_error"].axis)
    figure.legend(handles=_key(budgets, fixed), loc="outside upper center", ncols=len(budgets) + 1, frameon=False, borderaxespad=0.6)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _fill(axes: Axes, part: pd.DataFrame, styles: Mapping[str, dict[str, Any]], size_of: Callable[[Any], float]) -> None:
    """The points of a panel, a row a series in the order of `styles`, and a line where the exact method's own rounding is."""
    for y, (name, style) in enumerate(styles.items()):
        points = part[part["series"] == name]
        axes.plot(points["rel_error"], [y] * len(points), color=style["color"], linewidth=0.7, alpha=0.6, zorder=2)
        for point in points.to_dict("records"):
            scaled = style["markersize"] / 3.8 * size_of(point["budget"])
            axes.plot([point["rel_error"]], [y], **{**style, "linestyle": "none", "markersize": scaled}, zorder=3)
    if part["exact"].any():
        axes.axvline(part.loc[part["exact"], "rel_error"].max(), color=BASELINE, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def _key(budgets: Sequence[int], fixed: str) -> list[Line2D]:
    """What the marker sizes mean, and the line."""
    dots = [
        Line2D([], [], color="#444444", marker="o", linestyle="none", markersize=size(b, budgets, fixed), label=f"{b} units a query")
        for b in budgets
    ]
    return [*dots, Line2D([], [], color=BASELINE, linewidth=0.8, linestyle=(0, (2, 2)), label="exact softmax, rounded")]
