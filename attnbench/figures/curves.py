"""Learning curves: accuracy on the validation split against steps, a panel for each task and length, a thin line for each seed."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from attnbench import earned, frame, series
from attnbench.figures._style import WIDTHS, look, paper, variants, wrapped

NAME = "curves"


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a point of the learning rate that was chosen: `step`, `value`, and which `seed`, series and panel it is of."""
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    found: list[dict[str, Any]] = []
    for _, row in rows[rows["status"] == "ok"].iterrows():
        if "trained with" in row["panel"]:
            continue  # the curve is another method's
        trial = next(t for t in row["training"].trials if t.rate == row["training"].rate)
        told = {"panel": f"{row['panel']}, N={row['n']}", "series": row["series"], "label": row["label"], "method": row["method"]}
        found += [{**told, "seed": row["seed"], "rate": trial.rate, "step": step, "value": value} for step, value in trial.validation]
    return pd.DataFrame(found)


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was trained."""
    drawn = data(table)
    if drawn.empty:
        return None
    panels = sorted(drawn["panel"].unique(), key=series.natural)
    looks = variants([{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")])
    width = WIDTHS[columns]
    with paper():
        figure = Figure(figsize=(width, 1.5 + 1.5 * -(-len(panels) // 3)), layout="constrained")
        axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flatten()
        for i, axis in enumerate(axes):
            axis.set_visible(i < len(panels))
        for axis, panel in zip(axes, panels, strict=False):
            axis.set_title(panel)
            axis.set_ylim(-0.02, 1.02)
            for (name, seed), part in drawn[drawn["panel"] == panel].groupby(["series", "seed"], sort=True):
                style = look(str(part["label"].iloc[0]), looks[str(name)])
                first = seed == drawn.loc[(drawn["panel"] == panel) & (drawn["series"] == name), "seed"].min()
                axis.plot(part["step"], part["value"], label=str(name) if first else None, **{**style, "marker": "", "linewidth": 0.7})
        shown = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=3)
        figure.supylabel("validation accuracy", fontsize=7)
        rows = table[table["task"] == earned.TASK]
        caption = f"{series.describe(rows)}. Accuracy against training steps, a line a seed, each at the learning rate chosen for it."
        figure.supxlabel(wrapped(caption, width), fontsize=5.5, color="#444444", x=0.01, ha="left")
    return figure
