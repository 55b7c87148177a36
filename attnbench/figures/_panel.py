"""Bands of panels: for each a legend, a strip of failures, and the axes below them. Bands may stand side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from attnbench import series
from attnbench.figures._style import BASELINE, LETTERS, cited, heading, length_axis, look, variants

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    from attnbench.metrics import Metric

_LAST = ("series", "exact", "cited", "baseline")
_LINE_IN, _STRIP_IN, _EMPTY_IN = 0.125, 0.095, 0.02


def names(block: pd.DataFrame) -> list[str]:
    """Series of a block by family and name, then what is cited, a baseline last."""
    rows = block.drop_duplicates("series").to_dict("records")
    return [
        str(r["series"])
        for r in sorted(rows, key=lambda r: (_LAST.index(r["kind"]), series.family_rank(r["family"]), series.natural(str(r["series"]))))
    ]


def by_family(drawn: pd.DataFrame) -> list[str]:
    """Names of all series of the columns `series` and `family`, families together, wherever they are first drawn."""
    families = dict(zip(drawn["series"].astype(str), drawn["family"].astype(str), strict=True))
    return sorted(families, key=lambda name: (series.family_rank(families[name]), series.natural(name)))


def looks(drawn: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Line properties of each series of the columns `series`, `label` and `family`, in the order of `by_family`."""
    number = variants([{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")])
    labels = dict(zip(drawn["series"], drawn["label"], strict=True))
    return {name: look(str(labels[name]), number[name]) for name in by_family(drawn)}


def row_axis(axes: Axes, order: Sequence[str]) -> None:
    """A row a name, the first at the top."""
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)


def rules(axes: Axes, order: Sequence[str], drawn: pd.DataFrame) -> None:
    """A line between rows of different families, which are those of the whole figure."""
    families = dict(zip(drawn["series"], drawn["family"], strict=True))
    for y in range(1, len(order)):
        if families[order[y]] != families[order[y - 1]]:
            axes.axhline(y - 0.5, color="#bbbbbb", linewidth=0.4, zorder=0)


def legend_columns(entries: Sequence[str], width_in: float) -> int:
    """How many legend entries fit side by side."""
    longest = max(len(name) for name in entries) * 0.046 + 0.45
    return max(1, min(len(entries), int((width_in - 0.55) / longest)))


@dataclass(frozen=True)
class Band:
    """Panels side by side under one legend."""

    title: str
    block: pd.DataFrame
    panels: Sequence[str]

    @property
    def failed(self) -> list[str]:
        """Series that failed somewhere."""
        return names(self.block[self.block["status"] != "ok"])

    def heights(self, width_in: float, full: float) -> list[float]:
        """Inches of the legend, the strip and the axes, which are `full` high."""
        entries = names(self.block)
        lines = -(-len(entries) // legend_columns(entries, width_in)) + bool(self.title)
        return [_LINE_IN * lines + 0.04, max(_EMPTY_IN, _STRIP_IN * len(self.failed)), full]


@dataclass(frozen=True)
class Across:
    """The numbers along which all panels of a figure run, in the column `n` of what is drawn."""

    label: str = "sequence length N"
    powers: bool = True
    """whether they stand on a logarithmic axis, a tick each"""
    curves: bool = False
    """whether lines have so many points that few of these are marked, and their range is a band"""


@dataclass
class Canvas:
    """A figure being drawn, and what all its panels share."""

    figure: Figure
    grid: GridSpec
    span: int
    """columns of the grid that a band has"""
    lengths: Sequence[int]
    variants: Mapping[str, int]
    across: Across = Across()
    levels: Mapping[str, float] = field(default_factory=dict)
    """panel -> a value to be marked by a dotted line"""
    main: list[Axes] = field(default_factory=list)
    above: dict[int, Sequence[str]] = field(default_factory=dict)
    """place from the left -> panels of the band drawn last there: titles are not repeated below them"""

    @property
    def width_in(self) -> float:
        """Of a column of the grid."""
        return float(self.figure.get_figwidth()) / int(self.grid.ncols)

    def style(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        """Line properties of the series that a row belongs to."""
        if row["kind"] == "baseline":
            return {"color": BASELINE, "linewidth": 2.2, "alpha": 0.7, "solid_capstyle": "round", "zorder": 1}
        if row["kind"] == "cited":
            return cited(str(row["method"]), self.variants[str(row["series"])])
        return look(str(row["label"]), self.variants[str(row["series"])])

    def draw(self, band: Band, number: int, place: int, *, below: int) -> None:
        """Draw the band into three rows of the grid as the one at `place` from the left, of bands side by side.

        `below` panels of later bands stand under its first ones.
        """
        left = place * self.span
        entries = [(n, self._style_of(band.block, n)) for n in names(band.block)]
        legend(self.figure.add_subplot(self.grid[3 * number, left : left + self.span]), band.title, entries, self.width_in * self.span)
        for column, panel in enumerate(band.panels):
            leader = self.main[0] if self.main else None
            axes = self.figure.add_subplot(self.grid[3 * number + 2, left + column], sharex=leader, sharey=leader)
            part = band.block[band.block["panel"] == panel]
            for name in names(part):
                self._line(axes, part[part["series"] == name].sort_values("n"))
            self._along(axes)
            if panel in self.levels:
                axes.axhline(self.levels[panel], color="#888888", linewidth=0.7, linestyle=":", zorder=1)
            axes.tick_params(labelleft=left + column == 0, labelbottom=column >= below)
            axes.set_xlabel(self.across.label if column >= below else "")
            strip = self.figure.add_subplot(self.grid[3 * number + 1, left + column], sharex=axes)
            self._strip(strip, part, band.failed, first=column == 0)
            if self.above.get(place) != band.panels:
                strip.set_title(heading(panel, self.width_in), pad=3, fontweight="bold")
            unnamed(axes)
            self.main.append(axes)
        self.above[place] = band.panels

    def _along(self, axes: Axes) -> None:
        if self.across.powers:
            length_axis(axes, self.lengths, self.width_in - 0.35)
        elif not self.across.curves:  # a tick each
            axes.set_xticks(self.lengths[:: -(-len(self.lengths) // 8)])
            margin = 0.3 * min((b - a for a, b in pairwise(self.lengths)), default=1)
            axes.set_xlim(min(self.lengths) - margin, max(self.lengths) + margin)

    def _style_of(self, block: pd.DataFrame, name: str) -> dict[str, Any]:
        return self.style(block[block["series"] == name].iloc[0].to_dict())

    def _line(self, axes: Axes, rows: pd.DataFrame) -> None:
        """A series, broken where a length failed: nothing is drawn through a cell that has no value."""
        style = self.style(rows.iloc[0].to_dict())
        if self.across.curves and "marker" in style:
            every = max(1, len(rows) // 4)
            style |= {"markevery": (len(axes.get_lines()) * 2 % every, every), "markersize": 0.8 * style["markersize"]}
        good = rows["status"] == "ok"
        for _, run in rows[good].groupby((~good).cumsum()[good]):
            axes.plot(run["n"], run["value"], **style)
        if rows["kind"].iloc[0] == "baseline" or not good.any():
            return
        rows = rows[good]
        if self.across.curves:
            axes.fill_between(rows["n"], rows["low"], rows["high"], color=style["color"], alpha=0.18, linewidth=0)
            return
        axes.vlines(rows["n"], rows["low"], rows["high"], color=style["color"], linewidth=1.6, alpha=0.6)
        if rows["floor"].notna().all():
            axes.fill_between(rows["n"], *band(rows), color=style["color"], alpha=0.25, linewidth=0)

    def _strip(self, axes: Axes, part: pd.DataFrame, failed: Sequence[str], *, first: bool) -> None:
        """A row a failing series: its marker at the left, the letter of the status at each length that failed."""
        axes.set_ylim(max(len(failed), 1) - 0.5, -0.5)
        axes.set_axis_off()
        for y, name in enumerate(failed):
            rows = part[(part["series"] == name) & (part["status"] != "ok")]
            style = self._style_of(part, name) if (part["series"] == name).any() else {}
            for n, status in zip(rows["n"], rows["status"], strict=True):
                letter = LETTERS.get(status, "?")
                axes.text(n, y, letter, color=style["color"], fontsize=5.5, fontweight="bold", ha="center", va="center")
            if first and style:
                small = {**style, "linestyle": "none", "markersize": 3.4}
                axes.plot([-0.035], [y], transform=axes.get_yaxis_transform(), clip_on=False, **small)
            axes.axhline(y, color="#eeeeee", linewidth=0.4, zorder=0)


def legend(axes: Axes, title: str, entries: Sequence[tuple[str, dict[str, Any]]], width_in: float) -> None:
    """Fill an empty place of the grid, `width_in` wide, with a legend."""
    handles = [Line2D([], [], label=name, **style) for name, style in entries]
    axes.axis("off")
    columns = legend_columns([name for name, _ in entries], width_in)
    made = axes.legend(handles=handles, loc="lower left", ncols=columns, title=title or None, alignment="left")
    made.get_title().set(fontweight="bold", fontsize=6.5)
    made.set_in_layout(False)


def unnamed(axes: Axes) -> None:
    """Give axis labels without text a place, for which Matplotlib would measure all ticks at every drawing."""
    for axis in (axes.xaxis, axes.yaxis):
        if not axis.get_label_text():
            axis.set_label_coords(0.5, 0.5)


def fit(axes: Sequence[Axes], drawn: pd.DataFrame, metric: Metric) -> None:
    """One value axis for all panels, wide enough for every point."""
    if metric.scale == "linear":
        axes[0].set_ylim(*span(drawn, metric))
        return
    axes[0].set_yscale("log")
    axes[0].set_ylim(*span(drawn, metric))
    for one in axes:
        plain(one.yaxis)


def band(rows: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Ends of the noise floor about each value: as far below as above on a logarithmic axis."""
    wide = 1 + rows["floor"]
    return rows["value"] / wide, rows["value"] * wide


def cut(drawn: pd.DataFrame, metric: Metric) -> bool:
    """Whether a logarithmic axis ends above some of what is drawn."""
    return bool(metric.scale == "log" and (drawn[["value", "low"]] < metric.least).any(axis=None))


_LEAST = 0.02
"""how much a linear axis spans at least, so that it does not magnify what is as good as equal"""


def span(drawn: pd.DataFrame, metric: Metric) -> tuple[float, float]:
    """Ends of an axis with room for every value and range, down to the least that a logarithmic one shows."""
    values = pd.concat([drawn[name] for name in ("value", "low", "high", "chance") if name in drawn]).dropna()
    if metric.scale == "linear":
        low, high = float(values.min()), float(values.max())
        high = max(high, low + _LEAST)
        return low - 0.05 * (high - low), high + 0.05 * (high - low)
    positive = values[values > 0]
    return (max(float(positive.min()) / 1.3, metric.least), float(positive.max()) * 1.3) if len(positive) else (0.1, 1.0)


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.01, 1, 1000, and powers of ten beyond.

    Where it spans under two decades, 2 and 5 as well, and under a factor of four every digit; beyond, 2 and 5 are marked.
    """
    low, high = axis.get_view_interval()
    if high / low < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low >= 4 else range(1, 10)))
    axis.set_minor_locator(NullLocator() if high / low < 100 else LogLocator(subs=(2, 5)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else f"$10^{{{round(math.log10(value))}}}$")
    )
    axis.set_minor_formatter(NullFormatter())
