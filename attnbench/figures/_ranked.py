"""A metric at one sequence length, the best method first: a row each, its number beside its point."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from attnbench import series
from attnbench.figures import _panel
from attnbench.figures._style import BASELINE, COLOURS, LETTERS, WIDTHS, length, look, variants, wrapped
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes

    from attnbench.metrics import Metric

_ROW_IN = 0.13
_NUMBER_IN = 0.4
"""Room of a number beside its point."""


def fits(drawn: pd.DataFrame) -> bool:
    """Whether every panel has one length alone, where a line would be a point."""
    return bool(drawn.groupby("panel")["n"].nunique().max() == 1)


def ranked(part: pd.DataFrame) -> pd.DataFrame:
    """Series of a panel as they stand below each other: the lowest value first, what failed last."""
    rows = part[part["kind"] == "series"]
    return rows.sort_values(["value", "family", "series"], na_position="last", kind="stable")


def draw(drawn: pd.DataFrame, caption: str, metric: Metric, columns: int) -> Figure:
    """The figure of rows that `fits`, with the columns of `attnbench.figures._facets.Facets.data` and `joules_per_call`.

    Args:
        drawn: one row a point or failure; `kind` is `series`, or `baseline` for the best exact method, a grey line.
        caption: small print below.
        metric: what stands on the value axis, lower being better.
        columns: of the page, 1 or 2.
    """
    panels, width = series.panel_order(drawn["panel"].unique()), WIDTHS[columns]
    parts = [drawn[drawn["panel"] == panel] for panel in panels]
    across = min(len(panels), columns)
    down, most = -(-len(panels) // across), max(len(ranked(part)) for part in parts)
    families = [f for f in Family if (drawn["family"] == f).any()]
    entries: list[tuple[str, dict[str, Any]]] = [(f, {"color": COLOURS[f], "marker": "s", "linestyle": "none"}) for f in families]
    key = -(-len(entries) // _panel.legend_columns([name for name, _ in entries], width)) * 0.125 + 0.1 if entries else 0.02
    caption = wrapped(" ".join(caption.split()), width)
    panel_in = _ROW_IN * (most + 1) + 0.5
    figure = Figure(figsize=(width, key + down * panel_in + 0.1 + 0.115 * (caption.count("\n") + 1)), layout="constrained")
    grid = figure.add_gridspec(down + 1, across, height_ratios=[key, *[panel_in] * down])
    _panel.legend(figure.add_subplot(grid[0, :]), "", entries, width)
    points = [{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")]
    counts = variants(points)
    room_in = width / across - 1.7
    first: Axes | None = None
    for i, (panel, part) in enumerate(zip(panels, parts, strict=True)):
        axes = figure.add_subplot(grid[1 + i // across, i % across], sharex=first)
        _fill(axes, part, counts, most)
        axes.set_title(f"{panel}, N={length(int(part['n'].iloc[0]))}", pad=9, fontweight="bold")
        axes.set_xlabel(metric.axis)
        if first is None:
            first = axes
            _values(axes, drawn, metric, room_in)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _fill(axes: Axes, part: pd.DataFrame, counts: Mapping[str, int], rows: int) -> None:
    """The points of a panel with their numbers, the letters of what failed, and the best dense value."""
    shown = ranked(part).to_dict("records")
    at_end: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 5.5}
    for y, p in enumerate(shown):
        style = look(str(p["label"]), counts[str(p["series"])]) | {"linestyle": "none"}
        if p["status"] != "ok":
            axes.text(0.02, y, LETTERS.get(str(p["status"]), "?"), **at_end, color=style["color"], fontweight="bold")
            continue
        axes.plot([0, p["value"]], [y, y], color=style["color"], linewidth=0.6, alpha=0.45, zorder=2)
        axes.plot([p["value"]], [y], **style, zorder=3)
        axes.annotate(number(p["value"]), (p["value"], y), (5, 0), textcoords="offset points", fontsize=5.5, va="center", zorder=4)
        axes.text(1.01, y, number(p["joules_per_call"]), **at_end)
    axes.text(1.01, -1.0, "J a call", **at_end, color="#444444")
    for value in part.loc[part["kind"] == "baseline", "value"]:
        axes.axvline(value, color=BASELINE, linewidth=2.2, alpha=0.5, zorder=1)
    axes.set_yticks(range(len(shown)), [str(p["series"]) for p in shown])
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def number(value: float) -> str:
    """Three significant digits, without powers of ten down to a billionth."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(digits, 9)}f}"


def _values(axes: Axes, drawn: pd.DataFrame, metric: Metric, room_in: float) -> None:
    """A logarithmic axis with room for the number of the largest value."""
    low, high = _panel.span(drawn, metric)
    axes.set_xscale("log")
    axes.set_xlim(low, high * (high / low) ** (_NUMBER_IN / max(room_in - _NUMBER_IN, 0.5)))
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    _panel.plain(axes.xaxis)
