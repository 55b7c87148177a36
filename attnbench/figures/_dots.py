"""A metric at one sequence length a panel: a row a series with its name beside it, where lines against length would be single points."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from attnbench import series
from attnbench.figures import _panel
from attnbench.figures._style import BASELINE, LETTERS, WIDTHS, cited, heading, length, look, variants, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from attnbench.metrics import Metric

_ROW_IN = 0.13
"""inches of a row"""


def draw(
    drawn: pd.DataFrame,
    caption: str,
    metric: Metric,
    columns: int,
    *,
    order: Sequence[str] = (),
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """The figure of rows of which each panel has a single `n`, with the columns of `attnbench.figures._facets.Facets.data`.

    Args:
        drawn: one row a point or failure; `kind` is `series`, `baseline`, `cited`, or `exact` for what is not drawn.
        caption: small print below.
        metric: what stands on the value axis.
        columns: of the page, 1 or 2.
        order: of the panels; by mode and input profile where it is not given.
        levels: panel -> a value that is marked by a dotted line.
    """
    rows = drawn[drawn["kind"].isin(["series", "cited"])]
    names, panels = _panel.names(rows), order or series.panel_order(drawn["panel"].unique())
    across = min(len(panels), 4 if columns == 2 else 1)
    down = -(-len(panels) // across)
    caption = wrapped(" ".join(caption.split()), WIDTHS[columns])
    height = down * (_ROW_IN * (len(names) + 1) + 0.35) + 0.3 + 0.115 * (caption.count("\n") + 1)
    figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    styles = _styles(rows)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(panels))
        if i < len(panels):
            _fill(axes, drawn[drawn["panel"] == panels[i]], names, styles)
            if levels and panels[i] in levels:
                axes.axvline(levels[panels[i]], color="#888888", linewidth=0.7, linestyle=":", zorder=1)
            axes.set_title(heading(panels[i], WIDTHS[columns] / across), pad=3, fontweight="bold")
            axes.tick_params(labelbottom=i + across >= len(panels))
    _values(grid.flat[0], drawn[drawn["kind"] != "exact"], metric)
    _panel.row_axis(grid.flat[0], names)
    one = f", N={length(int(drawn['n'].iloc[0]))}" if drawn["n"].nunique() == 1 else ""
    figure.suptitle(f"{metric.axis}{one}", fontsize=7)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _styles(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    points = [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]
    number = variants(points)
    return {
        str(p["series"]): (
            cited(str(p["method"]), number[str(p["series"])]) if p["kind"] == "cited" else look(str(p["label"]), number[str(p["series"])])
        )
        | {"linestyle": "none"}
        for p in points
    }


def _fill(axes: Axes, part: pd.DataFrame, order: Sequence[str], styles: Mapping[str, dict[str, Any]]) -> None:
    """The points of a panel, their ranges and noise floors, what failed, and the best dense value."""
    families = dict(zip(part["series"], part["family"], strict=True))
    for y, name in enumerate(order):
        if y and name in families and families.get(order[y - 1]) not in (None, families[name]):
            axes.axhline(y - 0.5, color="#bbbbbb", linewidth=0.4, zorder=0)
        for p in part[part["series"] == name].to_dict("records"):
            style = styles[name]
            if p["status"] != "ok":
                axes.text(
                    0.02, y, LETTERS.get(str(p["status"]), "?"), transform=axes.get_yaxis_transform(), color=style["color"],
                    fontsize=5.5, fontweight="bold", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3},
                )  # fmt: skip
                continue
            axes.plot([p["low"], p["high"]], [y, y], color=style["color"], linewidth=1.6, alpha=0.6)
            if not math.isnan(p["floor"]):
                ends = [p["value"] / (1 + p["floor"]), p["value"] * (1 + p["floor"])]
                axes.plot(ends, [y, y], color=style["color"], linewidth=4.5, alpha=0.25, solid_capstyle="butt")
            axes.plot([p["value"]], [y], **style, zorder=3, clip_on=False)
    for value in part.loc[part["kind"] == "baseline", "value"]:
        axes.axvline(value, color=BASELINE, linewidth=2.2, alpha=0.7, zorder=1)


def _values(axes: Axes, drawn: pd.DataFrame, metric: Metric) -> None:
    """One value axis for all panels."""
    low, high = _panel.span(drawn, metric)
    axes.set_xlim(low, high)
    if metric.scale == "log":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        _panel.plain(axes.xaxis)
