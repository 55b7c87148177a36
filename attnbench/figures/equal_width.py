"""Fidelity where every query reads as many hidden units: what a method makes of the same budget, and in what time.

Drawn against time; a row a method where cells were not timed.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from attnbench import frame, series, stats
from attnbench.figures import _front, _panel, _rungs
from attnbench.figures._place import Name, annotate
from attnbench.figures._style import WIDTHS, length, look, paper, variants, wrapped
from attnbench.method import Shape
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

NAME = "equal_width"
FIXED = "fixed"
"""The budget of a method that reads what its shape gives it."""
_NEAR = 0.15
"""How far from the budget the units that a query reads may be without being told."""


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """Fidelity groups in which parameters were set by budgets."""
    for group in series.groups(table[table["task"] == "fidelity"]):
        if "budget" in group.rows and group.rows["budget"].map(bool).any():
            yield group


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a point.

    `profile`, `n`, `series` (the method, and parameters away from their defaults that no budget sets), `budget` (units a query or
    `fixed`), `width` (units read, as counted), `params`, `time_ms` and `rel_error` (medians over seeds, of forward passes), `exact` and
    `front` (no other point of its profile and length beats it in both time and error).
    """
    if table.empty or "budget" not in table or "rel_error" not in table:
        return pd.DataFrame()
    series.one_device(table)
    rows = frame.current(table)
    rows = rows[(rows["task"] == "fidelity") & (rows["mode"] == "forward") & (rows["replicate"] == 0) & (rows["status"] == "ok")]
    if not rows["budget"].map(bool).any():
        return pd.DataFrame()
    rows = rows.assign(set_by=rows["params"], params=_own(rows))
    rows = rows.assign(series=series.labels(rows), budget=rows["budget"].map(lambda b: list(b) or [FIXED])).explode("budget")
    found = [_point(cell) for _, cell in rows.groupby(["profile", "n", "series", "budget"], sort=False)]
    found.sort(key=_order)
    return pd.DataFrame(_front.marked(found, ["profile", "n"], _front.time_and_error))


def _own(rows: pd.DataFrame) -> list[str]:
    """The parameters of each row, as JSON, that are not at their defaults and that no budget sets for any row of the method."""
    set_by: dict[str, set[str]] = {}
    for row in rows.to_dict("records"):
        method = series.method_of(str(row["method"]))
        if method and method.budget and row["budget"]:
            sizes = {name: int(row[name]) for name in ("batch", "heads", "n", "dim", "kv_heads", "dim_v")}
            ours = method.budget(Shape(**sizes), method.parse(json.loads(row["params"])), row["budget"][0])
            set_by.setdefault(method.name, set()).update(ours)
    return [_left(str(row["method"]), json.loads(row["params"]), set_by) for row in rows.to_dict("records")]


def _left(name: str, params: dict[str, Any], set_by: dict[str, set[str]]) -> str:
    method = series.method_of(name)
    usual = method.params().as_dict() if method else {}
    kept = {k: v for k, v in params.items() if k not in set_by.get(name, ()) and (k not in usual or v != usual[k])}
    return json.dumps(kept, sort_keys=True)


def _point(cell: pd.DataFrame) -> dict[str, Any]:
    first = cell.iloc[0]
    method = str(first["method"])
    return {
        "profile": str(first["profile"]), "n": int(first["n"]), "series": first["series"], "label": first["label"], "method": method,
        "family": str(series.family(method) or "other"), "budget": first["budget"], "params": first["set_by"],
        "width": float(cell["width"].median()) if "width" in cell else float("nan"),
        "time_ms": stats.median(cell["time_s"].tolist()) * 1e3, "rel_error": stats.median(cell["rel_error"].tolist()),
        "exact": series.exact(method),
    }  # fmt: skip


def timed(drawn: pd.DataFrame) -> bool:
    """Whether every point that is drawn has a time."""
    return bool(drawn.loc[~drawn["exact"], "time_ms"].notna().all())


def _order(point: dict[str, Any]) -> tuple[Any, ...]:
    budget = 0 if point["budget"] == FIXED else int(point["budget"])
    return point["profile"], point["n"], series.family_rank(point["family"]), series.natural(str(point["series"])), budget


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure: a row of panels for each input profile, a column for each length; None where no budget was asked for."""
    drawn = data(table)
    if drawn.empty or drawn["exact"].all():
        return None
    with paper():
        cells = table[table["task"] == "fidelity"]
        if timed(drawn):
            return _draw(drawn, cells, columns)
        return _rungs.draw(drawn, _caption(drawn, cells), columns, FIXED)


def _draw(drawn: pd.DataFrame, table: pd.DataFrame, columns: int) -> Figure:
    profiles, lengths = series.panel_order(drawn["profile"].unique()), sorted(drawn["n"].unique())
    own = [{str(k): v for k, v in row.items()} for row in drawn[~drawn["exact"]].to_dict("records")]
    number = variants(own)
    entries = {str(p["series"]): look(str(p["label"]), number[str(p["series"])]) for p in sorted(own, key=_order)}
    width, caption = WIDTHS[columns], wrapped(_caption(drawn, table), WIDTHS[columns])
    lines = -(-len(entries) // _panel.legend_columns(list(entries), width))
    sizes = [0.125 * lines + 0.06, *[2.2] * len(profiles)]
    figure = Figure(
        figsize=(width, sum(sizes) + 0.2 * len(profiles) + 0.4 + 0.115 * (caption.count("\n") + 1)),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.015, hspace=0.0, wspace=0.02),
    )
    grid = GridSpec(len(sizes), len(lengths), figure=figure, height_ratios=sizes)
    marks = [(name, {**style, "linestyle": "none"}) for name, style in entries.items()]
    _panel.legend(figure.add_subplot(grid[0, :]), "", marks, width)
    placed: list[tuple[Axes, pd.DataFrame]] = []
    budgets = sorted(b for b in drawn["budget"].unique() if b != FIXED)
    for i, profile in enumerate(profiles):
        for j, n in enumerate(lengths):
            axes = figure.add_subplot(grid[1 + i, j], sharey=placed[0][0] if placed else None, sharex=placed[j][0] if i else None)
            part = drawn[(drawn["profile"] == profile) & (drawn["n"] == n)]
            _panel_of(axes, part, entries, budgets)
            axes.set_title(f"{profile}, N={length(n)}", pad=3, fontweight="bold")
            axes.tick_params(labelleft=j == 0)
            axes.set_xlabel("time per call (ms)" if i == len(profiles) - 1 else "")
            placed.append((axes, part))
    figure.supylabel(METRICS["rel_error"].axis, fontsize=7)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    for axes, _ in placed:
        _panel.plain(axes.xaxis)
        _panel.plain(axes.yaxis)
    figure.draw_without_rendering()
    for axes, part in placed:
        _name(axes, part[~part["exact"]], entries)
    return figure


def _panel_of(axes: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]], budgets: list[int]) -> None:
    """A line through the budgets of each method, larger markers for larger ones; a line across for the best exact time."""
    axes.set(xscale="log", yscale="log")
    for name, points in part[~part["exact"]].groupby("series", sort=False):
        style = entries[str(name)]
        axes.plot(points["time_ms"], points["rel_error"], color=style["color"], linewidth=0.7, alpha=0.6, zorder=2)
        for point in points.to_dict("records"):
            size = style["markersize"] / 3.8 * _rungs.size(point["budget"], budgets, FIXED)
            axes.plot([point["time_ms"]], [point["rel_error"]], **{**style, "linestyle": "none", "markersize": size}, zorder=3)
    if part["exact"].any():
        axes.axvline(part.loc[part["exact"], "time_ms"].min(), color="#000000", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def _name(axes: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]]) -> None:
    """The method beside its largest budget; of many methods those on the front alone, beside their largest there."""
    many = part["series"].nunique() > _front.FEW
    own = part[part["front"]] if many else part
    last = own.groupby("series", sort=False).tail(1).sort_values("time_ms").to_dict("records")
    spots = list(zip(part["time_ms"].tolist(), part["rel_error"].tolist(), strict=True))
    names = [Name(str(p["series"]), (float(p["time_ms"]), float(p["rel_error"])), many, entries[str(p["series"])]["color"]) for p in last]
    annotate(axes, names, spots)


def _off(drawn: pd.DataFrame) -> str:
    """Widths that a method could not bring near the budget, as counted; with the profiles, where it is not on all."""
    profiles: dict[str, list[str]] = {}
    for p in drawn[drawn["budget"] != FIXED].to_dict("records"):
        if abs(p["width"] - p["budget"]) > _NEAR * p["budget"]:
            profiles.setdefault(f"{p['series']} {p['width']:.0f} for {p['budget']} at N={length(p['n'])}", []).append(str(p["profile"]))
    every = drawn["profile"].nunique()
    found = [text if len(where) == every else f"{text} ({', '.join(where)})" for text, where in profiles.items()]
    return f"Further than {_NEAR:.0%} from the budget: {', '.join(found)}." if found else ""


def _caption(drawn: pd.DataFrame, table: pd.DataFrame) -> str:
    budgets = sorted(int(b) for b in drawn["budget"].unique() if b != FIXED)
    parts = [f"{series.describe(table)}, forward. Hidden units that a query reads: {', '.join(map(str, budgets))}, larger markers for more"]
    fixed = sorted(drawn.loc[(drawn["budget"] == FIXED) & ~drawn["exact"], "series"].unique())
    parts[0] += f"; fixed by the method: {', '.join(fixed)}." if fixed else "."
    if timed(drawn):
        parts.append(f"Names in panels of more than {_front.FEW} methods: what nothing else beats in both time and error.")
    parts.append(_off(drawn))
    learned = {str(row["method"]) for row in table.to_dict("records") if row.get("learned")}
    if learned:
        titles = sorted(drawn.loc[drawn["method"].isin(learned), "series"].unique())
        parts.append(f"Learned parameters as initialised, untrained: {', '.join(titles)}.")
    if drawn["exact"].any() and timed(drawn):
        parts.append(f"Dashed: the fastest exact method ({', '.join(sorted(drawn.loc[drawn['exact'], 'series'].unique()))}).")
    measured = table[table["status"] == "ok"]
    parts.append(series.settings(measured.assign(params=_own(measured))).strip())
    failed = table[(table["status"] != "ok") & (table["replicate"] == 0)]
    if len(failed):
        counts = sorted(f"{row['label']} ({row['status']})" for row in failed.to_dict("records"))
        parts.append("Failed: " + ", ".join(f"{len(list(same))} {what}" for what, same in itertools.groupby(counts)) + ".")
    return " ".join(part for part in parts if part)
