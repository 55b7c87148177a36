"""What is left of a trained model's accuracy when another method takes the place of its own, against what that method may read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series
from attnbench.figures._multiples import draw, failures
from attnbench.figures._panel import Across
from attnbench.figures._style import paper
from attnbench.figures.accuracy import conditions, over_seeds, point
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

NAME = "swap_in"
LABEL = "budget (units a query)"


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a series, panel (task, model, N) and budget `n`, as `attnbench.figures.accuracy.point` gives it.

    `before` is the mean accuracy of the model with its own method. A method without a budget stands at every one, `fixed`.
    """
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table), swapped=True)
    if rows.empty or not (rows["status"] == "ok").any():
        return pd.DataFrame()
    rows = rows.assign(
        panel=[f"{p}, N={n}" for p, n in zip(rows["panel"], rows["n"], strict=True)],
        series=series.labels(rows.assign(params=rows["words"])),
    )
    rows["budget"] = rows["budget"].map(list)
    points = [p for _, part in rows.groupby("panel", sort=True) for p in _panel(part)]
    return pd.DataFrame(points)


def _panel(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    budgets = sorted({b for found in rows["budget"] for b in found})
    before = earned.before(rows).mean()
    for _, part in rows.groupby("series", sort=True):
        fixed = not part["budget"].map(bool).any()
        if fixed and part["own"].nunique() > 1:
            continue  # a grid of parameters, which a heat map shows
        for budget in budgets:
            own = part if fixed else part[part["budget"].map(lambda found, b=budget: b in found)]
            if len(own):
                yield {**point(own, "accuracy"), "n": budget, "before": before, "fixed": fixed}


def titled(panel: str) -> str:
    """What was asked and of which model, in lines short enough to stand above a panel."""
    task, _, rest = panel.partition(", trained with ")
    model, _, n = rest.rpartition(", N=")
    return f"{task}, N={n},\ntrained with {model}".replace(" (", "\n(")


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing took another's place under a budget."""
    drawn = data(table)
    if drawn.empty:
        return None
    levels = {str(panel): float(value) for panel, value in drawn.groupby("panel")["before"].first().items()}
    fixed = sorted(drawn.loc[drawn["fixed"], "series"].unique(), key=series.natural)
    caption = f"{conditions(table, drawn)} {over_seeds(drawn)} Dotted: the model with its own method. {failures(drawn)}"
    caption += f" The same at every budget: {', '.join(fixed)}." if fixed else ""
    titles = {panel: titled(panel) for panel in drawn["panel"].unique()}
    drawn["panel"] = drawn["panel"].map(titles)
    with paper():
        return draw(
            drawn, caption, METRICS["accuracy"], columns, order=sorted(titles.values(), key=series.natural), most=5, along=Across(LABEL),
            levels={titles[panel]: value for panel, value in levels.items()},
        )  # fmt: skip
