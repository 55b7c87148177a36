"""From which length on each method is faster than a baseline: a row a method, with the interval, or the reason why there is no length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from attnbench import crossover, frame, series
from attnbench.errors import UserError
from attnbench.figures._style import WIDTHS, length, length_axis, look, variants, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

NAME = "crossover"
BASELINES = ("softmax@cudnn", "softmax@flash", "softmax")
"""The first of these that was measured is what the others are held against."""
_ROW_IN = 0.13


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a series and mode.

    `panel` (the mode), `series`, `label`, `method`, `family`, `baseline`, `answer` (of `attnbench.crossover.Answer`), `n`, `low` and `high`
    (the length from which on it is faster, and its 95% interval; empty where there is none), `shortest` and `longest` (lengths at which
    both were measured) and `note`.
    """
    if table.empty or "mode" not in table:
        return pd.DataFrame()
    series.one_device(table)
    rows = frame.current(table)
    rows = rows[(rows["task"] == "speed") & (rows["replicate"] == 0)]
    against = next((name for name in BASELINES if name in set(rows["label"])), None)
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


def _row(one: crossover.Crossover, label: str) -> dict[str, Any]:
    method = label.partition("@")[0]
    low, at, high = (round(n) for n in one.length) if one.length else (None, None, None)
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
    order, panels = list(dict.fromkeys(drawn["series"])), series.panel_order(drawn["panel"].unique())
    number = variants([{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")])
    styles = {str(p["series"]): look(str(p["label"]), number[str(p["series"])]) | {"linestyle": "none"} for p in drawn.to_dict("records")}
    cells = table[(table["task"] == "speed") & (table["replicate"] == 0)]
    caption = wrapped(_caption(drawn, cells), WIDTHS[columns])
    across = len(panels) if columns == 2 else 1
    down = -(-len(panels) // across)
    height = down * (_ROW_IN * (len(order) + 1) + 0.45) + 0.115 * (caption.count("\n") + 1)
    figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    lengths = sorted({int(n) for n in cells["n"].unique()})
    for axes, panel in zip(grid.flat, panels, strict=True):
        _fill(axes, drawn[drawn["panel"] == panel], styles, lengths)
        axes.set_title(panel, pad=3, fontweight="bold")
        axes.set_xlabel(f"faster than {drawn['baseline'].iloc[0]} from N =")
    length_axis(grid.flat[0], lengths, WIDTHS[columns] / (across + 0.6))
    grid.flat[0].set_yticks(range(len(order)), order)
    grid.flat[0].set_ylim(len(order) - 0.5, -0.5)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _fill(axes: Axes, part: pd.DataFrame, styles: Mapping[str, dict[str, Any]], lengths: Sequence[int]) -> None:
    """A point with its interval where there is a length; else the answer in words, at the end of the range."""
    families, above = dict(zip(part["series"], part["family"], strict=True)), None
    rows = {str(p["series"]): p for p in part.to_dict("records")}
    for y, (name, style) in enumerate(styles.items()):
        if y and families.get(name) != above:
            axes.axhline(y - 0.5, color="#bbbbbb", linewidth=0.4, zorder=0)
        above, p = families.get(name), rows.get(name)
        if p is None:
            continue
        if p["answer"] != crossover.Answer.FROM:
            axes.text(lengths[-1], y, str(p["answer"]), fontsize=5.5, color="#444444", ha="right", va="center")
            continue
        ends = [max(lengths[0], p["low"]), min(lengths[-1], p["high"])]
        axes.plot(ends, [y, y], color=style["color"], linewidth=1.6, alpha=0.6)
        axes.plot([max(lengths[0], p["n"])], [y], **style, zorder=3, clip_on=False)
        if p["n"] <= lengths[0]:
            axes.annotate(f"≤ {length(lengths[0])}", (ends[1], y), (4, 0), textcoords="offset points", fontsize=5.5, va="center")


def _caption(drawn: pd.DataFrame, cells: pd.DataFrame) -> str:
    missing = drawn[(drawn["answer"] == crossover.Answer.FROM) & drawn["n"].notna() & (drawn["high"] > cells["n"].max())]
    parts = [
        f"{series.describe(cells)}. Point: the length from which on the method is faster up to the longest that was measured; bar: 95%"
        " interval, by bootstrap of the samples and widened by the A/A noise floor; ≤: at or below the shortest length.",
        f"Bars of {', '.join(dict.fromkeys(missing['series']))} go beyond the axis." if len(missing) else "",
        "Not separable: at the longest length the two are closer than the noise. Beyond memory or time: one ran out before it was faster."
        if len(drawn[drawn["answer"] != crossover.Answer.FROM]) else "",
        series.settings(cells[cells["status"] == "ok"]).strip(),
    ]  # fmt: skip
    return " ".join(part for part in parts if part)
