"""Figures with a row a method along a length or an error, as plots to zoom into: equal width without clocks, and crossovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench import series
from attnbench.figures import _rungs, crossover, equal_width
from attnbench.figures._bokeh import columns, figure, hover, source
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd


def in_rows(data: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Titles and plots of what `crossover.data` gives, or `equal_width.data` without times."""
    if "answer" in data:
        timed = data[data.groupby("panel")["shortest"].transform("count") > 0]
        yield from ((mode, crossings(timed[timed["panel"] == mode])) for mode in series.panel_order(timed["panel"].unique()))
        return
    for profile in series.panel_order(data["profile"].unique()):
        whole = data[(data["profile"] == profile) & ~data["exact"] & (data["rel_error"] > 0)]
        budgets = sorted(int(b) for b in data["budget"].unique() if b != equal_width.FIXED)
        yield from ((f"{profile}, N={n}", rungs(part, budgets)) for n, part in whole.groupby("n", sort=True))


def rungs(data: pd.DataFrame, budgets: Sequence[int]) -> Any:
    """A row a method with a point a budget, of rows of `attnbench.figures.equal_width.data` of one panel and one length."""
    axis = METRICS["rel_error"].axis
    best = data.groupby("series")["rel_error"].min().sort_values()
    plot = _rows(axis, best.index.tolist(), (float(data["rel_error"].min()) / 1.3, float(data["rel_error"].max()) * 1.3))
    told = [f"{budget} units" for budget in data["budget"]]
    sizes = [2.0 * _rungs.size(b, budgets, equal_width.FIXED) for b in data["budget"]]
    drawn = source(columns(data, "rel_error", "width", bar=data["series"].tolist(), told=told, size=sizes))
    spots = plot.scatter("rel_error", "bar", size="size", color="color", marker="marker", hover_line_color="black", source=drawn)
    hover(plot, spots, ("method", "@bar"), ("budget", "@told"), ("units read", "@width{0.[0]}"), (axis, "@rel_error{0.000e}"))
    return plot


def crossings(data: pd.DataFrame) -> Any:
    """A row a method: the length from which on it is faster and its interval, of rows of `attnbench.figures.crossover.data` of one mode.

    Where there is no such length the answer is written at the end of the range.
    """
    data = data.sort_values("n", na_position="last", kind="stable")
    ends = float(data["shortest"].min()) / 1.2, float(data["longest"].max()) * 1.2
    plot = _rows(f"faster than {crossover.baseline(data)} from N =", list(dict.fromkeys(data["series"])), ends)
    good, others = data[data["n"].notna()], data[data["n"].isna()]
    good = good.assign(high=good["high"].clip(upper=ends[1]))
    told = [f"{'at most ' if n <= s else ''}{n:.0f}" for n, s in zip(good["n"], good["shortest"], strict=True)]
    drawn = source(columns(good, "n", "low", "high", bar=good["series"].tolist(), told=told))
    plot.segment("low", "bar", "high", "bar", color="color", line_width=2, alpha=0.6, source=drawn)
    spots = plot.scatter("n", "bar", size=9, color="color", marker="marker", hover_line_color="black", source=drawn)
    hover(plot, spots, ("method", "@bar"), ("faster from N =", "@told"), ("95% interval", "@low{0} to @high{0}"))
    if len(others):
        edge = columns(others, bar=others["series"].tolist(), x=[ends[1] / 1.1] * len(others), why=others["answer"].tolist())
        plot.text("x", "bar", text="why", text_align="right", text_baseline="middle", text_font_size="8pt", source=source(edge))
    return plot


def _rows(axis: str, names: Sequence[str], ends: tuple[float, float]) -> Any:
    """An empty plot with a row a name, from the top, over a logarithmic axis."""
    from bokeh.models import FactorRange

    plot = figure(axis, "", x_scale="log", y_scale="", x_range=ends, y_range=FactorRange(factors=list(names)[::-1]))
    plot.height = 110 + 20 * len(names)
    return plot
