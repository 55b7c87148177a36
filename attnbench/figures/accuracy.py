"""Trained accuracy against sequence length, a panel for each task: mean over seeds, with their range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from attnbench import earned, frame, series
from attnbench.figures._style import WIDTHS, length_axis, look, paper, variants, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "accuracy"


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a series, panel and N: `value`, `low`, `high` over `seeds`, or the `status` of a seed that failed; `chance` of a guess."""
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    found = []
    for _, part in rows.groupby(["panel", "series", "n"], sort=True):
        first, good = part.iloc[0], part[part["status"] == "ok"]
        failed = part.loc[part["status"] != "ok", "status"].tolist()
        values = [] if failed else good["accuracy"].tolist()
        found.append({
            "panel": first["panel"], "series": first["series"], "label": first["label"], "method": first["method"], "params": first["own"],
            "n": int(first["n"]), "value": sum(values) / len(values) if values else float("nan"),
            "low": min(values, default=float("nan")), "high": max(values, default=float("nan")), "seeds": len(part),
            "status": failed[0] if failed else "ok", "chance": good["training"].iloc[0].chance if len(good) else float("nan"),
        })  # fmt: skip
    drawn = pd.DataFrame(found)
    return drawn if (drawn["status"] == "ok").any() else pd.DataFrame()


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was trained."""
    drawn = data(table)
    if drawn.empty:
        return None
    panels = sorted(drawn.loc[drawn["status"] == "ok", "panel"].unique(), key=series.natural)
    looks = variants([{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")])
    width = WIDTHS[columns]
    with paper():
        figure = Figure(figsize=(width, 1.5 + 1.7 * -(-len(panels) // 3)), layout="constrained")
        axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flatten()
        for i, axis in enumerate(axes):
            axis.set_visible(i < len(panels))
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, drawn[drawn["panel"] == panel], looks, width / 3 - 0.4)
            axis.set_title(panel)
        shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=3)
        figure.supylabel("test accuracy", fontsize=7)
        figure.supxlabel(wrapped(_caption(drawn, table), width), fontsize=5.5, color="#444444", x=0.01, ha="left")
    return figure


def _draw(axes: Axes, drawn: pd.DataFrame, looks: dict[str, int], room_in: float) -> None:
    for name in sorted(drawn["series"].unique(), key=series.natural):
        part = drawn[(drawn["series"] == name) & (drawn["status"] == "ok")].sort_values("n")
        if len(part):
            style: dict[str, Any] = look(str(part["label"].iloc[0]), looks[str(name)])
            (line,) = axes.plot(part["n"], part["value"], label=str(name), **style)
            axes.vlines(part["n"], part["low"], part["high"], color=line.get_color(), linewidth=0.8)
    axes.axhline(float(drawn["chance"].max()), color="#888888", linewidth=0.6, linestyle=":")
    axes.set_ylim(-0.02, 1.02)
    length_axis(axes, sorted(drawn["n"].unique()), room_in)


def _caption(drawn: pd.DataFrame, table: pd.DataFrame) -> str:
    failed = drawn[drawn["status"] != "ok"]
    lost = "; ".join(
        f"{panel}: {status} {', '.join(sorted(part['series'].unique()))}" for (panel, status), part in failed.groupby(["panel", "status"])
    )
    seeds = f"{drawn['seeds'].min()} to {drawn['seeds'].max()}" if drawn["seeds"].nunique() > 1 else str(drawn["seeds"].iloc[0])
    rows = table[table["task"] == earned.TASK]
    return f"{series.describe(rows)}. Mean and range over {seeds} seeds; dotted: a guess." + (f" Not drawn: {lost}." if lost else "")
