"""Trained accuracy by slice of the test split, such as the number of pairs to recall: a figure for each task, a panel for each length."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series
from attnbench.figures import curves
from attnbench.figures._multiples import draw
from attnbench.figures._panel import Across
from attnbench.figures._style import paper
from attnbench.figures.accuracy import caption, spread, with_baseline
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

NAME = "slices"
LABEL = "slice of the test split"
groups = curves.groups
_UNORDERED = ("", "group", "class")
"""what a task's slices count where nothing grows along them"""
_WIDE = 8
"""ratio of the largest to the smallest slice from which the axis is logarithmic"""


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a series, panel and slice `n`: mean `value`, range `low` to `high` over the seeds that were trained; `counts` says of what.

    A range of slices stands at its lower end. Left out are slices that not every seed has, and those that are in no order, such as classes.
    """
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    rows = rows[(rows["status"] == "ok") & (rows["steps"] > 1)] if len(rows) else rows
    points = [p for _, part in rows.groupby(["panel", "series", "n"], sort=True) for p in _sliced(part)] if len(rows) else []
    return with_baseline(pd.DataFrame(points))


def _sliced(part: pd.DataFrame) -> Iterator[dict[str, Any]]:
    first = part.iloc[0]
    counts, known = first["training"].group, [training.groups for training in part["training"]]
    shared = set.intersection(*map(set, known)) if counts not in _UNORDERED else set()
    for place, name in sorted((int(name.partition("-")[0]), name) for name in shared) if len(shared) > 1 else ():
        values = [found[name] for found in known]
        yield {**spread(part, values, panel=f"{first['panel']}, N={first['n']}", n=place), "counts": counts}


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where no slices are in order."""
    drawn = data(table)
    if drawn.empty:
        return None
    told, task = caption(table, drawn), curves.untitled(drawn, table)
    along = Across(str(drawn["counts"].iloc[0]), powers=drawn["n"].max() >= _WIDE * drawn["n"].min())
    with paper():
        order = sorted(drawn["panel"].unique(), key=series.natural)
        return draw(drawn, told, replace(METRICS["accuracy"], label=f"test accuracy, {task}"), columns, order=order, most=6, along=along)
