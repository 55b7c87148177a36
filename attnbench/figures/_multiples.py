"""Small multiples: panels side by side, in one band where lines are few, else in a band for each family with the best dense in grey."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from attnbench import metrics, series
from attnbench.figures import _panel
from attnbench.figures._style import LETTERS, WIDTHS, WORDS, variants, wrapped
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attnbench.metrics import Metric

CROWDED = 8
"""More series than this are split into a row of panels for each family."""

BASELINE = "best dense"


def draw(
    drawn: pd.DataFrame,
    caption: str,
    metric: Metric,
    columns: int,
    *,
    order: Sequence[str] = (),
    most: int = 4,
    along: _panel.Across | None = None,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """The figure of rows with the columns of `attnbench.figures._facets.Facets.data`.

    Args:
        drawn: one row a point or failure; `kind` is `series`, `baseline`, `cited`, or `exact` for what is not drawn.
        caption: small print below.
        metric: what stands on the value axis.
        columns: of the page, 1 or 2.
        order: of the panels; by mode and input profile where it is not given.
        most: panels side by side, at most, where the figure is two columns wide.
        along: what all panels run along, in the column `n`; sequence lengths by default.
        levels: panel -> a value that is marked by a dotted line.
    """
    blocks = _blocks(drawn)
    panels = order or series.panel_order(drawn["panel"].unique())
    width = WIDTHS[columns]
    across = min(len(panels), most if columns == 2 else 2)
    bands = [_panel.Band(title, block, panels[i : i + across]) for title, block in blocks for i in range(0, len(panels), across)]
    beside = 2 if columns == 2 and len(blocks) > 1 and 2 * len(panels) <= most else 1
    rows = [bands[i : i + beside] for i in range(0, len(bands), beside)]
    full = (0.95 if beside > 1 else 0.8) if len(blocks) > 1 else 2.1 if columns == 2 else 1.7
    sizes = [max(part) for row in rows for part in zip(*(band.heights(width / beside, full) for band in row), strict=True)]
    caption = wrapped(" ".join(caption.split()), width)
    height = sum(sizes) + 0.05 * len(sizes) + 0.42 + 0.115 * (caption.count("\n") + 1)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.015, hspace=0.0, wspace=0.02))
    grid = GridSpec(len(sizes), across * beside, figure=figure, height_ratios=sizes)
    points = [{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")]
    canvas = _panel.Canvas(figure, grid, across, sorted(drawn["n"].unique()), variants(points), along or _panel.Across(), levels or {})
    for i, row in enumerate(rows):
        for j, band in enumerate(row):
            canvas.draw(band, i, j, below=max((len(later[j].panels) for later in rows[i + 1 :] if len(later) > j), default=0))
    _panel.fit(canvas.main, drawn[drawn["kind"] != "exact"], metric)
    figure.supylabel(metric.axis, fontsize=7)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def failures(drawn: pd.DataFrame, where: str = "Above the axes") -> str:
    """What the letters say that stand `where`; empty where nothing failed."""
    failed = [s for s in LETTERS if s in set(drawn["status"])]
    return f"{where}: " + ", ".join(f"{LETTERS[s]} {WORDS[s]}" for s in failed) + "." if failed else ""


def baseline(points: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The best exact point of each panel at each place, to be repeated in the panels of other families; none where lines are few."""
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    for p in points:
        if p["kind"] == "series" and p["status"] == "ok" and series.exact(p["method"]):
            key = (p["panel"], p["n"])
            if key not in best or metrics.better(metric, p["value"], best[key]["value"]):
                best[key] = p
    crowded = len({p["series"] for p in points if p["kind"] == "series"}) > CROWDED
    return [{**p, "kind": "baseline", "series": BASELINE, "floor": float("nan")} for p in best.values()] if crowded else []


def _blocks(drawn: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of panels: all series in one where they are few, else one for each family, in the taxonomy's order."""
    own, grey = drawn[drawn["kind"].isin(["series", "cited"])], drawn[drawn["kind"] == "baseline"]
    if drawn.loc[drawn["kind"] == "series", "series"].nunique() <= CROWDED:
        return [("", own)]
    order = [*(str(f) for f in Family), "other"]
    found = [(f, own[own["family"] == f]) for f in order if (own["family"] == f).any()]
    return [(f, block if f == Family.DENSE else pd.concat([block, grey])) for f, block in found]
