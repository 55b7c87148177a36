"""Where the time of each method goes, stage by stage, against sequence length: a panel a method, shares above and milliseconds below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from attnbench import frame, series
from attnbench.figures import _panel
from attnbench.figures._stages import GAPS, colour, fill
from attnbench.figures._style import WIDTHS, length, paper, wrapped
from attnbench.record import Breakdown
from attnbench.stages import rank
from attnbench.store import device_slug

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

NAME = "anatomy"
_FLOOR: dict[str, Any] = {"color": "black", "linewidth": 0.8}
_THIN = 0.03
"""Segments of less than this share of a call have no room for the mark of their floor."""


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """The measured rows that were taken apart, by device, suite, conditions and mode."""
    rows = _taken_apart(table)
    for group in series.groups(rows) if len(rows) else ():
        for mode in series.panel_order(group.rows["mode"].unique()):
            yield group._replace(place=f"{group.place}-{device_slug(mode)}", rows=group.rows[group.rows["mode"] == mode])


def _taken_apart(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty or "breakdown" not in table:
        return pd.DataFrame()
    rows = frame.current(table)
    known = rows["breakdown"].map(lambda b: isinstance(b, Breakdown) and bool(b.stages_s))
    return rows[(rows["status"] == "ok") & (rows["replicate"] == 0) & (rows["task"] == "speed") & known.astype(bool)]


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a stage of a cell, `launch gaps` the last: the timed call (`whole_ms`) less all stages.

    `share` is of the timed call, or of the sum of stages where a profiler that slows operators down makes that larger: gaps are then
    negative and have share 0. `floor_ms` is the stage's roofline floor `max(FLOP / matmul rate, bytes / copy bandwidth)`.
    """
    rows = _taken_apart(table)
    if rows.empty:
        return pd.DataFrame()
    series.one_device(rows)
    cells = rows.assign(series=series.labels(rows)).to_dict("records")
    found = [line for cell in cells for line in _lines({str(k): v for k, v in cell.items()})]
    ordered = sorted(found, key=lambda p: (series.family_rank(p["family"]), series.natural(str(p["series"])), p["panel"], p["n"]))
    return pd.DataFrame(ordered)


def _lines(cell: dict[str, Any]) -> list[dict[str, Any]]:
    parts: Breakdown = cell["breakdown"]
    whole = max(float(cell["time_s"]), parts.total_s)
    common = {
        "panel": cell["mode"], "family": str(series.family(cell["method"]) or "other"), "series": cell["series"], "label": cell["label"],
        "params": cell["params"], "ran": cell["implementation"], "n": int(cell["n"]),
    }  # fmt: skip
    counts = {"launches": parts.launches, "kernels": parts.kernels, "synchronisations": parts.synchronisations}
    found = []
    for stage in sorted(parts.stages_s, key=rank):
        seconds, floor = parts.stages_s[stage], _floor(cell, parts, stage)
        found.append({**common, "stage": stage, "time_ms": seconds * 1e3, "share": seconds / whole,
                      "floor_ms": floor * 1e3, "floor_share": floor / whole})  # fmt: skip
    gap = float(cell["time_s"]) - parts.total_s
    found.append({**common, "stage": GAPS, "time_ms": gap * 1e3, "share": max(0.0, gap) / whole, "floor_ms": np.nan, "floor_share": np.nan})
    return [{**line, "whole_ms": float(cell["time_s"]) * 1e3, **counts} for line in found]


def _floor(cell: dict[str, Any], parts: Breakdown, stage: str) -> float:
    """Roofline floor of a stage in seconds; NaN where nothing is counted for it or a rate is not known."""
    flops, moved = parts.flops.get(stage, 0), parts.bytes.get(stage, 0)
    rates = [cell.get(name) for name in ("matmul_flops_per_s", "copy_bytes_per_s")]
    if not (flops or moved) or any(r is None or r != r for r in rates):  # noqa: PLR0124 (NaN)
        return np.nan
    return max(work / float(rate or np.nan) for work, rate in zip((flops, moved), rates, strict=True))


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was taken apart. Raises `ValueError` where the table mixes modes or conditions: see `groups`."""
    drawn = data(table)
    if drawn.empty:
        return None
    if len(list(groups(table))) > 1:
        raise ValueError("the table mixes devices, suites, conditions or modes: split it with anatomy.groups first")
    with paper():
        return _draw(drawn, _taken_apart(table), columns)


def _draw(drawn: pd.DataFrame, rows: pd.DataFrame, columns: int) -> Figure:
    names, lengths = list(dict.fromkeys(drawn["series"])), sorted(drawn["n"].unique())
    stages = [*sorted(set(drawn["stage"]) - {GAPS}, key=rank), GAPS]
    width, across = WIDTHS[columns], min(len(names), 2 if columns == 1 else min((5, 4), key=lambda a: -len(names) % a))
    down = -(-len(names) // across)
    entries = [*stages, "roofline floor", "timed call"]
    per_line = _panel.legend_columns(entries, width)
    caption = wrapped(_caption(drawn, rows), width)
    sizes = [0.125 * -(-len(entries) // per_line) + 0.06, *[0.85, 0.6] * down]
    figure = Figure(
        figsize=(width, sum(sizes) + 0.33 * down + 0.3 + 0.115 * (caption.count("\n") + 1)),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.02, hspace=0.0, wspace=0.02),
    )
    grid = GridSpec(len(sizes), across, figure=figure, height_ratios=sizes)
    _legend(figure.add_subplot(grid[0, :]), stages, per_line)
    leader: Axes | None = None
    for i, name in enumerate(names):
        row, column = 1 + 2 * (i // across), i % across
        part = drawn[drawn["series"] == name]
        shares = figure.add_subplot(grid[row, column])
        times = figure.add_subplot(grid[row + 1, column], sharex=shares, sharey=leader)
        leader = leader or times
        _shares(shares, part, lengths)
        _times(times, part, lengths)
        shares.set_title(f"{name}\n{_counts(part)}", pad=2, fontsize=6, linespacing=1.1)
        for axes, label in ((shares, "share of the call"), (times, "ms")):
            axes.tick_params(labelleft=column == 0)
            axes.set_ylabel(label if column == 0 else "", fontsize=6)
        times.set_xlabel("N" if i + across >= len(names) else "", fontsize=6)
    assert leader is not None, "there is a series"
    _limits(leader, drawn)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _shares(axes: Axes, part: pd.DataFrame, lengths: Sequence[int]) -> None:
    """Stacked bars at equal distances; in each segment its floor, from the segment's lower edge."""
    for cell in (p for _, p in part.groupby("n")):
        x, bottom = lengths.index(int(cell["n"].iloc[0])), 0.0
        for line in cell.to_dict("records"):
            axes.bar(x, line["share"], 0.8, bottom, **fill(line["stage"]))
            if line["floor_share"] > 0 and line["share"] >= _THIN:
                height = bottom + min(line["floor_share"], line["share"])
                axes.plot([x - 0.4, x + 0.4], [height, height], solid_capstyle="butt", **_FLOOR)
            bottom += line["share"]
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.grid(visible=False, axis="x")
    axes.tick_params(labelbottom=False, bottom=False)


def _times(axes: Axes, part: pd.DataFrame, lengths: Sequence[int]) -> None:
    """Lines of the stages, and the timed call in black."""
    for stage in sorted(set(part["stage"]) - {GAPS}, key=rank):
        rows = part[part["stage"] == stage]
        axes.plot([lengths.index(n) for n in rows["n"]], rows["time_ms"], color=colour(stage), marker=".", markersize=2.5, linewidth=0.8)
    whole = part.drop_duplicates("n")
    axes.plot([lengths.index(n) for n in whole["n"]], whole["whole_ms"], color="black", linewidth=1.1, zorder=1)
    every = max(1, -(-len(lengths) // 5))
    axes.set_xticks(range(len(lengths)), [length(n) if i % every == 0 else "" for i, n in enumerate(lengths)])
    axes.set_xlim(-0.6, len(lengths) - 0.4)


def _limits(axes: Axes, drawn: pd.DataFrame) -> None:
    """One logarithmic axis of time for all panels."""
    values = pd.concat([drawn.loc[drawn["stage"] != GAPS, "time_ms"], drawn["whole_ms"]])
    axes.set_yscale("log")
    axes.set_ylim(float(values[values > 0].min()) / 1.3, float(values.max()) * 1.3)
    _panel.plain(axes.yaxis)


def _counts(part: pd.DataFrame) -> str:
    """Launches of a call and waits for the device, at the largest length of a series."""
    last = part[part["n"] == part["n"].max()].iloc[0]
    if pd.isna(last["synchronisations"]):
        return f"{last['launches']} operators"
    waits = int(last["synchronisations"])
    return f"{last['launches']} launches, {waits} {'wait' if waits == 1 else 'waits'}"


def _legend(axes: Axes, stages: Sequence[str], columns: int) -> None:
    handles = [*(Patch(label=s, **fill(s)) for s in stages), Line2D([], [], label="roofline floor", **_FLOOR),
               Line2D([], [], label="timed call", color="black", linewidth=1.1)]  # fmt: skip
    axes.axis("off")
    axes.legend(handles=handles, loc="lower left", ncols=columns, handlelength=1.4).set_in_layout(False)


def _caption(drawn: pd.DataFrame, rows: pd.DataFrame) -> str:
    source = rows["breakdown"].iloc[0].source
    text = (
        f"{series.describe(rows)}, {drawn['panel'].iloc[0]}. {series.settings(rows)}Stages: {source}, median over calls under a profiler; "
    )
    text += "launch gaps: the timed call less all stages. Bars: shares of the timed call; the mark in a segment is its roofline floor, "
    text += f"counted from the segment's lower edge, where it is {_THIN:.0%} or more of the call. "
    text += "Titles count what one call launches at the largest length."
    over = drawn[(drawn["stage"] == GAPS) & (drawn["time_ms"] < 0)]
    return text + (" Where the stages add up to more than the timed call, shares are of their sum." if len(over) else "")
