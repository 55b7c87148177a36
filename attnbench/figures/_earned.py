"""Trained accuracy against what a call costs, a panel for each task and length: which methods no other beats in both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from attnbench import earned, frame, joining, series
from attnbench.figures import _front, _panel
from attnbench.figures._place import Name, annotate
from attnbench.figures._style import WIDTHS, heading, look, paper, variants, wrapped
from attnbench.figures.accuracy import conditions, over_seeds, point
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

_ACROSS = 3


@dataclass(frozen=True)
class Against:
    """What to hold accuracy against."""

    metric: str
    """of `attnbench.metrics.METRICS`, less of which is better"""

    def groups(self, table: pd.DataFrame) -> Iterator[series.Group]:
        """Each group of trained models with all records that may tell what its methods cost."""
        others = table[table["task"].isin(["speed", "fidelity"])]
        for group in series.groups(table[table["task"] == earned.TASK]):
            yield group._replace(rows=pd.concat([group.rows, others]))

    def data(self, table: pd.DataFrame) -> pd.DataFrame:
        """What is drawn, one row a point of panels that have two: `panel` (task and N), accuracy `value`, `low`, `high` over `seeds`.

        `cost` is in the axis's unit.
        `source` says which records the cost is from, `apart` where they are of another length or form, `differs` of which other
        parameters; `front` whether nothing beats the point in both. The columns are those of `attnbench.figures.accuracy.point` beside.
        """
        drawn = self._costed(table)
        if drawn.empty:
            return drawn
        compared = drawn[drawn.groupby("panel")["series"].transform("nunique") > 1]
        return compared.sort_values("panel", key=lambda c: c.map(series.natural), kind="stable")

    def _costed(self, table: pd.DataFrame) -> pd.DataFrame:
        """All points of which a cost is known."""
        if table.empty or earned.TASK not in set(table["task"]):
            return pd.DataFrame()
        rows, others = earned.asked(frame.current(table)), table[table["task"] != earned.TASK]
        rows = rows[rows["steps"] > 1] if len(rows) else rows  # one step is a model that has learned nothing
        found = [p for _, part in rows.groupby(["panel", "n"], sort=True) for p in self._points(part, others)]
        return pd.DataFrame(_front.marked(found, ["panel"], lambda p: (p["cost"], -p["value"])))

    def _points(self, rows: pd.DataFrame, others: pd.DataFrame) -> list[dict[str, Any]]:
        metric, n = METRICS[self.metric], int(rows["n"].iloc[0])
        source = joining.costs(others, rows, n)
        points = []
        for _, part in rows.groupby("series", sort=True):
            made, first = point(part, "accuracy"), part.iloc[0]
            found = source.find(first["method"], first["label"], first["params"]) if source else None
            cost = found.median(metric.column) if found else math.nan
            if found and made["status"] == "ok" and cost > 0:
                joined = {
                    "cost": cost / metric.divide,
                    "differs": found.differs,
                    "source": str(source),
                    "apart": source.apart if source else "",
                }
                points.append({**made, "panel": f"{made['panel']}, N={n}", **joined})
        return points

    def build(self, table: pd.DataFrame, columns: int = 2) -> Figure | None:
        """The figure; None where no panel has two methods to compare."""
        drawn = self.data(table)
        if drawn.empty:
            return None
        with paper():
            return self._draw(drawn, table, columns)

    def _draw(self, drawn: pd.DataFrame, table: pd.DataFrame, columns: int) -> Figure:
        panels, width = list(dict.fromkeys(drawn["panel"])), WIDTHS[columns]
        across = min(len(panels), _ACROSS if columns > 1 else 1)
        down = -(-len(panels) // across)
        entries, caption = _entries(drawn), wrapped(self._caption(drawn, table), width)
        lines = -(-len(entries) // _panel.legend_columns(list(entries), width))
        sizes = [0.125 * lines + 0.06, *[1.75] * down]
        figure = Figure(
            figsize=(width, sum(sizes) + 0.25 * down + 0.4 + 0.115 * (caption.count("\n") + 1)),
            layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0.0, wspace=0.02),
        )
        grid = GridSpec(len(sizes), across, figure=figure, height_ratios=sizes)
        _panel.legend(figure.add_subplot(grid[0, :]), "", list(entries.items()), width)
        placed = []
        for i, panel in enumerate(panels):
            axes, part = figure.add_subplot(grid[1 + i // across, i % across]), drawn[drawn["panel"] == panel]
            _plot(axes, part, entries)
            axes.set_title(heading(panel, width / across), pad=3, fontweight="bold")
            axes.set_xlabel(METRICS[self.metric].axis if i >= len(panels) - across else "")
            placed.append((axes, part))
        figure.supylabel("test accuracy", fontsize=7)
        figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
        figure.draw_without_rendering()
        for axes, part in placed:
            _name(axes, part, entries)
        return figure

    def _caption(self, drawn: pd.DataFrame, table: pd.DataFrame) -> str:
        word = METRICS[self.metric].label
        parts = [f"{conditions(table, drawn)} {over_seeds(drawn)} Line and bold names: Pareto front, what nothing else beats in both."]
        sources = drawn[["panel", "source", "apart"]].drop_duplicates().itertuples(index=False, name=None)
        parts += joining.told(f"{word[0].upper()}{word[1:]}", sources)
        other = drawn[drawn["differs"] != ""].drop_duplicates(["series", "differs"])
        if len(other):
            names = "; ".join(f"{s}: {d}" for s, d in zip(other["series"], other["differs"], strict=True))
            parts.append(f"Hollow: not measured with the parameters trained with, but with {names}.")
        rows = earned.asked(frame.current(table))
        absent = sorted(set(rows.loc[rows["status"] == "ok", "series"]) - set(self._costed(table)["series"]), key=series.natural)
        if absent:
            parts.append(f"Nowhere measured: {', '.join(absent)}.")
        return " ".join(parts)


def _entries(drawn: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Series -> its marker, in the taxonomy's order."""
    points = [{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")]
    number = variants(points)
    points.sort(key=lambda p: (series.family_rank(p["family"]), series.natural(p["series"])))
    return {p["series"]: {**look(p["label"], number[p["series"]]), "linestyle": "none"} for p in points}


def _plot(axes: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]]) -> None:
    """Points with the range over seeds, and the front."""
    axes.set_xscale("log")
    low, high = part["cost"].min(), part["cost"].max()
    room = 1.3 * (high / low) ** 0.12
    axes.set_xlim(low / room, high * room)
    for p in part.to_dict("records"):
        style = entries[str(p["series"])]
        axes.vlines(p["cost"], p["low"], p["high"], color=style["color"], linewidth=0.9, zorder=2)
        hollow = {"fillstyle": "none"} if p["differs"] else {}
        axes.plot([p["cost"]], [p["value"]], **{**style, **hollow}, zorder=3)
    axes.plot(*zip(*_staircase(part), strict=True), color="#555555", linewidth=0.8, zorder=1)
    span = max(part["high"].max() - part["low"].min(), 0.02)
    axes.set_ylim(part["low"].min() - 0.12 * span, part["high"].max() + 0.15 * span)
    _panel.plain(axes.xaxis)


def _staircase(part: pd.DataFrame) -> list[tuple[float, float]]:
    front = part[part["front"]].sort_values("cost")
    return _front.stairs(list(zip(front["cost"].tolist(), front["value"].tolist(), strict=True)))


def _name(axes: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]]) -> None:
    """Names of all, those of the front first, which so get the best places."""
    ranked = part.sort_values(["front", "cost"], ascending=[False, True]).to_dict("records")
    spots = [(float(p["cost"]), float(p["value"])) for p in ranked]
    names = [
        Name(str(p["series"]), spot, bool(p["front"]), entries[str(p["series"])]["color"]) for p, spot in zip(ranked, spots, strict=True)
    ]
    ranges = [[(float(p["cost"]), float(p["low"])), (float(p["cost"]), float(p["high"]))] for p in ranked]
    annotate(axes, names, spots, [_staircase(part), *ranges])
