"""From which length on each method is faster than a baseline: a row a method, with the interval, or the reason why there is no length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from attnbench import crossover, frame, series
from attnbench.errors import UserError
from attnbench.figures import _panel
from attnbench.figures._style import WIDTHS, length, length_axis, paper, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

NAME = "crossover"
BASELINES = ("softmax@cudnn", "softmax@flash", "softmax")
"""The first of these that was measured is what the others are held against."""
_ROW_IN = 0.13
_MEANINGS = {
    crossover.Answer.NEVER: "slower at the longest length that was measured",
    crossover.Answer.BEYOND: "one of the two ran out before the method was faster",
    crossover.Answer.NOT_SEPARABLE: "at the longest length the two are closer than the noise",
    crossover.Answer.NOT_MEASURED: "no length has a time of both",
}


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a series and mode.

    `panel` (the mode), `series`, `label`, `method`, `family`, `baseline`, `answer` (of `attnbench.crossover.Answer`), `n`, `low` and `high`
    (the length from which on it is faster, and its 95% interval, which may have no end; empty where there is none), `shortest` and
    `longest` (lengths at which both were measured) and `note`. Raises `ValueError` for a table of several conditions.
    """
    if table.empty or "mode" not in table:
        return pd.DataFrame()
    series.one_device(table)
    rows = _cells(table)
    if len(list(series.groups(rows))) > 1:
        raise ValueError("a figure of crossovers is of one group of conditions")
    measured = set(rows.loc[(rows["status"] == "ok") & rows["time_s"].notna(), "label"]) if "time_s" in rows else set()
    against = next((name for name in BASELINES if name in measured), None)
    if against is None or rows["n"].nunique() < 2:
        return pd.DataFrame()
    try:
        found = crossover.find(table, against)
    except UserError:  # nothing beside the baseline
        return pd.DataFrame()
    if not any(one.longest for one in found):  # no length at which both were timed
        return pd.DataFrame()
    rows = rows.assign(series=series.labels(rows))
    labels = dict(zip(rows["series"], rows["label"], strict=True))
    return pd.DataFrame([_row(one, labels[one.series]) for one in found])


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    rows = frame.current(table)
    return rows[(rows["task"] == "speed") & (rows["replicate"] == 0)]


def _row(one: crossover.Crossover, label: str) -> dict[str, Any]:
    method = label.partition("@")[0]
    low, at, high = (round(n) if math.isfinite(n) else n for n in one.length) if one.length else (None, None, None)
    return {
        "panel": one.mode, "series": one.series, "label": label, "method": method, "family": str(series.family(method) or "other"),
        "baseline": one.baseline, "answer": str(one.answer), "n": at, "low": low, "high": high, "shortest": one.shortest,
        "longest": one.longest, "note": one.note,
    }  # fmt: skip


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure: a panel a mode; None where no method was measured beside a baseline at two lengths."""
    drawn = data(table)
    if drawn.empty:
        return None
    with paper():
        return _draw(drawn, table, columns)


def _draw(drawn: pd.DataFrame, table: pd.DataFrame, columns: int) -> Figure:
    styles, panels = _panel.looks(drawn), series.panel_order(drawn["panel"].unique())
    order = list(styles)
    cells = _cells(table)
    caption = wrapped(_caption(drawn, cells, repeated=bool((table["replicate"] > 0).any())), WIDTHS[columns])
    across = len(panels) if columns == 2 else 1
    down = -(-len(panels) // across)
    height = down * (_ROW_IN * (len(order) + 1) + 0.45) + 0.115 * (caption.count("\n") + 1)
    figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    lengths = sorted({int(n) for n in cells["n"].unique()})
    for axes, panel in zip(grid.flat, panels, strict=True):
        _fill(axes, drawn[drawn["panel"] == panel], styles, lengths)
        axes.set_title(panel, pad=3, fontweight="bold")
        _panel.rules(axes, order, drawn)
        axes.set_xlabel(f"faster than {baseline(drawn)} from N =")
    length_axis(grid.flat[0], lengths, WIDTHS[columns] / (across + 0.6))
    _panel.row_axis(grid.flat[0], order)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _fill(axes: Axes, part: pd.DataFrame, styles: Mapping[str, dict[str, Any]], lengths: Sequence[int]) -> None:
    """A point with its interval where there is a length; else the answer in words, at the end of the range."""
    rows = {str(p["series"]): p for p in part.to_dict("records")}
    for y, (name, style) in enumerate(styles.items()):
        p = rows.get(name)
        if p is None:
            continue
        if p["answer"] != crossover.Answer.FROM:
            axes.text(lengths[-1], y, str(p["answer"]), fontsize=5.5, color="#444444", ha="right", va="center")
            continue
        ends = [max(lengths[0], p["low"]), min(lengths[-1], p["high"])]
        axes.plot(ends, [y, y], color=style["color"], linewidth=1.6, alpha=0.6)
        axes.plot([max(lengths[0], p["n"])], [y], **{**style, "linestyle": "none"}, zorder=3, clip_on=False)
        if p["n"] <= p["shortest"]:
            axes.annotate(f"≤ {length(p['shortest'])}", (ends[1], y), (4, 0), textcoords="offset points", fontsize=5.5, va="center")


def baseline(drawn: pd.DataFrame) -> str:
    """What the others are held against, without parameters where several of it are."""
    names = sorted(drawn["baseline"].unique())
    return str(names[0]) if len(names) == 1 else str(names[0]).partition(",")[0]


def _caption(drawn: pd.DataFrame, cells: pd.DataFrame, *, repeated: bool) -> str:
    endless = drawn[(drawn["answer"] == crossover.Answer.FROM) & (drawn["high"] > cells["n"].max())]
    parts = [
        f"{series.describe(cells)}. Point: the length from which on the method is faster, up to the longest that was measured; bar: 95%"
        f" interval, by bootstrap of the samples{' and widened by the A/A noise floor' if repeated else ''}; ≤: faster from the shortest"
        " length at which both were measured.",
        f"Bars that go beyond the axis: {', '.join(dict.fromkeys(endless['series']))}." if len(endless) else "",
        *(f"{answer.capitalize()}: {meaning}." for answer, meaning in _MEANINGS.items() if (drawn["answer"] == answer).any()),
        series.settings(cells[cells["status"] == "ok"]).strip(),
    ]
    return " ".join(part for part in parts if part)
