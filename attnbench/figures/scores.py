"""Trained accuracy on each task at each length: a row a method, mean over seeds with their range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnbench import series
from attnbench.figures import _dots
from attnbench.figures._multiples import failures
from attnbench.figures._style import length, paper
from attnbench.figures.accuracy import caption, points, with_baseline
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NAME = "scores"


def data(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the figure `accuracy`, of all tasks, with a panel for each task (`asked`) and length."""
    found = points(table)
    if found.empty:
        return found
    named = [f"{panel}, N={length(n)}" for panel, n in zip(found["panel"], found["n"], strict=True)]
    return with_baseline(found.assign(asked=found["panel"], panel=named))


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was trained."""
    drawn = data(table)
    if drawn.empty:
        return None
    levels = {str(panel): float(level) for panel, level in drawn.groupby("panel")["chance"].max().dropna().items()}
    told = caption(table, drawn, after=f"Dotted: a guess. {failures(drawn, 'Letters')}")
    with paper():
        places = sorted({(p, a, n) for p, a, n in zip(drawn["panel"], drawn["asked"], drawn["n"], strict=True)}, key=_in_order)
        return _dots.draw(drawn, told, METRICS["accuracy"], columns, order=[panel for panel, *_ in places], levels=levels)


def _in_order(place: tuple[str, str, int]) -> tuple[Any, int]:
    """Tasks by name, and lengths of one task from short to long."""
    _, asked, n = place
    return series.natural(asked), n
