"""Figures with a row a method along a length or an error, as plots to zoom into: equal width without clocks, and crossovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench import series
from attnbench.figures import _rungs, equal_width
from attnbench.figures._bokeh import columns, figure, hover, source
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd


def in_rows(data: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Titles and plots of what `crossover.data` gives, or `equal_width.data` without times."""
    if "answer" in data:
        yield from ((mode, crossings(data[data["panel"] == mode])) for mode in series.panel_order(data["panel"].unique()))
        return
    for profile in series.panel_order(data["profile"].unique()):
        whole = data[(data["profile"] == profile) & ~data["exact"]]
        yield from ((f"{profile}, N={n}", rungs(part)) for n, part in whole.groupby("n", sort=True))


def rungs(data: pd.DataFrame) -> Any:
    """A row a method with a point a budget, of rows of `attnbench.figures.equal_width.data` of one panel and one length."""
    axis = METRICS["rel_error"].axis
    best = data.groupby("series")["rel_error"].min().sort_values()
    plot = _rows(axis, best.index.tolist(), (float(data["rel_error"].min()) / 1.3, float(data["rel_error"].max()) * 1.3))
    told = [f"{budget} units" for budget in data["budget"]]
    budgets = sorted(int(b) for b in data["budget"].unique() if b != equal_width.FIXED)
    sizes = [2.0 * _rungs.size(b, budgets, equal_width.FIXED) for b in data["budget"]]
    drawn = source(columns(data, "rel_error", "width", bar=data["series"].tolist(), told=told, size=sizes))
    spots = plot.scatter("rel_error", "bar", size="size", color="color", marker="marker", hover_line_color="black", source=drawn)
    hover(plot, spots, ("method", "@bar"), ("budget", "@told"), ("units read", "@width{0.[0]}"), (axis, "@rel_error{0.000e}"))
    return plot


def crossings(data: pd.DataFrame) -> Any:
    """A row a method: the length from which on it is faster and its interval, of rows of `attnbench.figures.crossover.data` of one mode."""
    data = data.sort_values("n", na_position="last", kind="stable")
    lengths = data[["shortest", "longest"]].min().iloc[0], data[["shortest", "longest"]].max().iloc[1]
    plot = _rows(f"faster than {data['baseline'].iloc[0]} from N =", data["series"].tolist(), (lengths[0] / 1.2, lengths[1] * 1.2))
    good, others = data[data["n"].notna()], data[data["n"].isna()]
    drawn = source(columns(good, "n", "low", "high", bar=good["series"].tolist()))
    plot.segment("low", "bar", "high", "bar", color="color", line_width=2, alpha=0.6, source=drawn)
    spots = plot.scatter("n", "bar", size=9, color="color", marker="marker", hover_line_color="black", source=drawn)
    hover(plot, spots, ("method", "@bar"), ("faster from N =", "@n{0}"), ("95% interval", "@low{0} to @high{0}"))
    if len(others):
        edge = columns(others, bar=others["series"].tolist(), x=[float(lengths[1])] * len(others), why=others["answer"].tolist())
        marks = plot.scatter("x", "bar", size=9, marker="x", color="color", line_width=2, source=source(edge))
        hover(plot, marks, ("method", "@bar"), ("faster", "@why"))
    return plot


def _rows(axis: str, names: Sequence[str], ends: tuple[float, float]) -> Any:
    """An empty plot with a row a name, from the top, over a logarithmic axis."""
    from bokeh.models import FactorRange

    plot = figure(axis, "", x_scale="log", y_scale="", x_range=ends, y_range=FactorRange(factors=list(names)[::-1]))
    plot.height = 110 + 20 * len(names)
    return plot
