"""Learning curves: accuracy on the validation split against steps, a figure for each task, a panel for each length, over seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series
from attnbench.figures._multiples import draw
from attnbench.figures._panel import Across
from attnbench.figures._style import paper
from attnbench.figures.accuracy import caption, spread, with_baseline
from attnbench.metrics import METRICS
from attnbench.store import device_slug

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

    from attnbench.trials import Training

NAME = "curves"
LABEL = "training step"


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """A group for each trained task."""
    for group in series.groups(table[table["task"] == earned.TASK]):
        titles = earned.titles(group.rows["data"])
        for name, rows in group.rows.groupby("data", sort=True):
            yield group._replace(rows=rows, place=f"{group.place}-{device_slug(titles[str(name)])}")


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a series, panel and step `n`, at the learning rate that was chosen: `value`, `low`, `high` over the seeds that were trained.

    A run that stopped early, at the target, keeps its last value.
    """
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    rows = rows[rows["status"] == "ok"]
    points = [p for _, part in rows.groupby(["panel", "series", "n"], sort=True) for p in _curve(part)] if len(rows) else []
    return with_baseline(pd.DataFrame(points))  # of one point no curve is made


def _curve(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    first = part.iloc[0]
    curves = [validation(training) for training in part["training"]]
    steps = sorted({step for curve in curves for step in curve})
    for step in steps if len(steps) > 1 else ():
        values = [known for curve in curves if (known := _at(curve, step)) is not None]
        yield spread(part, values, panel=f"{first['panel']}, N={first['n']}", n=step)


def validation(training: Training) -> dict[int, float]:
    """Step -> accuracy on the validation split, of the learning rate that was chosen."""
    return dict(next(trial for trial in training.trials if trial.rate == training.rate).validation)


def _at(curve: dict[int, float], step: int) -> float | None:
    """The last value up to a step; None before the first."""
    known = [s for s in curve if s <= step]
    return curve[max(known)] if known else None


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was trained."""
    drawn = data(table)
    if drawn.empty:
        return None
    words = "On the validation split, each seed at the learning rate chosen for it; a run that stopped at the target keeps its last value."
    told, task = caption(table, drawn, before=words), untitled(drawn, table)
    metric = replace(METRICS["accuracy"], label=f"validation accuracy, {task}")
    with paper():
        order = sorted(drawn["panel"].unique(), key=series.natural)
        return draw(drawn, told, metric, columns, order=order, most=6, along=Across(LABEL, powers=False, curves=True))


def untitled(drawn: pd.DataFrame, table: pd.DataFrame) -> str:
    """The one task of a table, as it is printed, which the panels of `drawn` then leave out."""
    (task, *_) = earned.titles(table.loc[table["task"] == earned.TASK, "data"]).values()
    drawn["panel"] = drawn["panel"].str.removeprefix(f"{task}, ")
    return task
