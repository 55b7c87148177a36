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
from matplotlib.patheffects import Normal, Stroke

from attnbench import frame, series
from attnbench.figures import _panel
from attnbench.figures._multiples import failures
from attnbench.figures._stages import GAPS, colour, fill
from attnbench.figures._style import LETTERS, WIDTHS, length, paper, wrapped
from attnbench.record import Breakdown
from attnbench.stages import rank
from attnbench.store import device_slug

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

NAME = "anatomy"
_FLOOR: dict[str, Any] = {"color": "black", "linewidth": 0.7, "path_effects": [Stroke(linewidth=1.6, foreground="white"), Normal()]}
"""Black with a white edge, to be seen on every colour of a stage."""
_WHOLE: dict[str, Any] = {
    "color": "black", "linewidth": 0.7, "linestyle": (0, (2.5, 1.2)), "marker": "o", "markersize": 3.6, "markerfacecolor": "none",
    "markeredgewidth": 0.6,
}  # fmt: skip
"""Rings, to be seen around the point of a stage that is the whole call."""
_NUMBERS = ("time_ms", "share", "floor_ms", "floor_share", "whole_ms")
_COUNTS = ("launches", "kernels", "synchronisations")
_ABSENT = "-"
"""Marks a length at which a method was not taken apart, though it did not fail."""
_MANY = 20
"""More methods than this get smaller panels, more of them beside each other, so that a page holds them."""
_THIN = 0.04
"""Segments of less than this share of a call have no room for the mark of their floor."""


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """The measured rows that were taken apart, by device, suite, conditions and mode, with what failed beside them."""
    rows = _taken_apart(table)
    for group in series.groups(rows) if len(rows) else ():
        for mode in series.panel_order(group.rows["mode"].unique()):
            part = group.rows[group.rows["mode"] == mode]
            yield group._replace(place=f"{group.place}-{device_slug(mode)}", rows=pd.concat([part, _failed(table, part)]))


def _taken_apart(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty or "breakdown" not in table:
        return pd.DataFrame()
    rows = frame.current(table)
    known = rows["breakdown"].map(lambda b: isinstance(b, Breakdown) and bool(b.stages_s))
    return rows[
        (rows["status"] == "ok") & (rows["replicate"] == 0) & (rows["task"] == "speed") & known.astype(bool) & rows["apart_s"].notna()
    ]


def _failed(table: pd.DataFrame, apart: pd.DataFrame) -> pd.DataFrame:
    """Failed cells of the methods that were taken apart, at the lengths at which any was."""
    rows = frame.current(table)
    rows = rows[(rows["status"] != "ok") & (rows["replicate"] == 0) & (rows["task"] == "speed")]
    place = ["suite", "device", "mode", *series.CONDITIONS]

    def among(*more: str) -> Any:
        return pd.MultiIndex.from_frame(rows[[*place, *more]]).isin(pd.MultiIndex.from_frame(apart[[*place, *more]]))

    failed: pd.DataFrame = rows[among("label", "params") & among("n")]
    return failed


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a stage of a cell, `launch gaps` the last: the timed call (`whole_ms`) less all stages.

    The timed call is of the attempt that was taken apart. A failed cell has one row, without stage, at lengths of the others.

    `share` is of the timed call, or of the sum of stages where a profiler that slows operators down makes that larger: gaps are then
    negative and have share 0. `floor_ms` is the stage's roofline floor `max(FLOP / matmul rate, bytes / copy bandwidth)`.
    """
    rows = _taken_apart(table)
    if rows.empty:
        return pd.DataFrame()
    series.one_device(rows)
    rows = pd.concat([rows, _failed(table, rows)])
    cells = rows.assign(series=series.labels(rows)).to_dict("records")
    found = [line for cell in cells for line in _lines({str(k): v for k, v in cell.items()})]
    ordered = sorted(found, key=lambda p: (series.family_rank(p["family"]), series.natural(str(p["series"])), p["panel"], p["n"]))
    return pd.DataFrame(ordered).astype(dict.fromkeys(_COUNTS, "Int64"))


def _lines(cell: dict[str, Any]) -> list[dict[str, Any]]:
    common = {
        "panel": cell["mode"], "family": str(series.family(cell["method"]) or "other"), "series": cell["series"], "label": cell["label"],
        "params": cell["params"], "ran": cell["implementation"], "n": int(cell["n"]), "status": cell["status"],
    }  # fmt: skip
    if cell["status"] != "ok":
        return [{**common, "stage": "", **dict.fromkeys(_NUMBERS, np.nan), **dict.fromkeys(_COUNTS)}]
    parts: Breakdown = cell["breakdown"]
    time_s = float(cell["apart_s"])
    whole = max(time_s, parts.total_s)
    counts = {name: getattr(parts, name) for name in _COUNTS}
    found = []
    for stage in sorted(parts.stages_s, key=rank):
        seconds, floor = parts.stages_s[stage], _floor(cell, parts, stage)
        found.append({**common, "stage": stage, "time_ms": seconds * 1e3, "share": seconds / whole,
                      "floor_ms": floor * 1e3, "floor_share": floor / whole})  # fmt: skip
    gap = time_s - parts.total_s
    found.append({**common, "stage": GAPS, "time_ms": gap * 1e3, "share": max(0.0, gap) / whole, "floor_ms": np.nan, "floor_share": np.nan})
    return [{**line, "whole_ms": time_s * 1e3, **counts} for line in found]


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
    stages = [*_stages(drawn), GAPS]
    wide, high = ((6, 5), (0.78, 0.55)) if len(names) > _MANY else ((5, 4), (0.85, 0.6))
    width, across = WIDTHS[columns], min(len(names), 2 if columns == 1 else min(wide, key=lambda a: -len(names) % a))
    down = -(-len(names) // across)
    entries = [*stages, "roofline floor", "timed call"]
    per_line = _panel.legend_columns(entries, width)
    caption = wrapped(_caption(drawn, rows), width)
    sizes = [0.125 * -(-len(entries) // per_line) + 0.06, *[*high] * down]
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
    for x, n in enumerate(lengths):
        cell, bottom = part[part["n"] == n], 0.0
        if mark := _mark(cell):
            axes.text(x, 0.06, mark, fontsize=5.5, fontweight="bold", ha="center")
            continue
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


def _mark(cell: pd.DataFrame) -> str:
    """What stands in place of a bar; empty where there is one."""
    if cell.empty:
        return _ABSENT
    status = str(cell["status"].iloc[0])
    return "" if status == "ok" else LETTERS.get(status, "?")


def _stages(drawn: pd.DataFrame) -> list[str]:
    """Stages of some rows in order, without launch gaps."""
    return sorted(set(drawn.loc[drawn["status"] == "ok", "stage"]) - {GAPS}, key=rank)


def _times(axes: Axes, part: pd.DataFrame, lengths: Sequence[int]) -> None:
    """Lines of the stages, and the timed call in black rings."""
    part = part[part["status"] == "ok"]
    for stage in _stages(part):
        rows = part[part["stage"] == stage]
        axes.plot([lengths.index(n) for n in rows["n"]], rows["time_ms"], color=colour(stage), marker=".", markersize=2.5, linewidth=0.8)
    whole = part.drop_duplicates("n")
    axes.plot([lengths.index(n) for n in whole["n"]], whole["whole_ms"], **_WHOLE)
    every = max(1, -(-len(lengths) // 5))
    axes.set_xticks(range(len(lengths)), [length(n) if i % every == 0 else "" for i, n in enumerate(lengths)])
    axes.set_xlim(-0.6, len(lengths) - 0.4)


def _limits(axes: Axes, drawn: pd.DataFrame) -> None:
    """One logarithmic axis of time for all panels."""
    values = pd.concat([drawn.loc[drawn["stage"] != GAPS, "time_ms"], drawn["whole_ms"]])
    axes.set_yscale("log")
    axes.set_ylim(float(values[values > 0].min()) / 1.3, float(values.max()) * 2)
    _panel.plain(axes.yaxis)


def _counts(part: pd.DataFrame) -> str:
    """Launches of a call and waits for the device, at the largest length at which a series was taken apart."""
    last = part[part["status"] == "ok"].sort_values("n").iloc[-1]
    if pd.isna(last["synchronisations"]):
        return _count(last["launches"], "operator", "operators")
    return f"{_count(last['launches'], 'launch', 'launches')}, {_count(last['synchronisations'], 'wait', 'waits')}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _legend(axes: Axes, stages: Sequence[str], columns: int) -> None:
    handles: list[Any] = [Patch(**fill(s)) for s in stages]
    handles += [(Patch(facecolor="#aaaaaa"), Line2D([], [], **_FLOOR)), Line2D([], [], **_WHOLE)]
    axes.axis("off")
    names = [*stages, "roofline floor", "timed call"]
    axes.legend(handles, names, loc="lower left", ncols=columns, handlelength=2.2).set_in_layout(False)


def _caption(drawn: pd.DataFrame, rows: pd.DataFrame) -> str:
    source = rows["breakdown"].iloc[0].source
    text = (
        f"{series.describe(rows)}, {drawn['panel'].iloc[0]}. {series.settings(rows)}Stages: {source}, median over calls under a profiler; "
    )
    text += "launch gaps: the timed call less all stages. Bars: shares of the timed call; the mark in a segment is its roofline floor, "
    text += f"counted from the segment's lower edge, where it is {_THIN:.0%} or more of the call. "
    text += "Titles count what one call launches at the largest length at which it was taken apart."
    if ((drawn["stage"] == GAPS) & (drawn["time_ms"] < 0)).any():
        text += " Where the stages add up to more than the timed call, shares are of their sum."
    marks = [failures(drawn, "Letters")]
    if len(drawn[["series", "n"]].drop_duplicates()) < drawn["series"].nunique() * drawn["n"].nunique():
        marks.append(f"{_ABSENT} not taken apart.")
    return " ".join(part for part in (text, *marks, series.earlier(rows, "apart_s", "Timed and taken apart")) if part)
