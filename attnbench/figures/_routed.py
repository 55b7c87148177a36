"""Routing of trained models: what a record says of every layer, over seeds, a panel for each task and length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series
from attnbench.figures._multiples import draw, failures
from attnbench.figures._panel import cut
from attnbench.figures._style import paper
from attnbench.figures.accuracy import asked_at_several, caption, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from matplotlib.figure import Figure

    from attnbench.figures._panel import Across
    from attnbench.metrics import Metric
    from attnbench.trials import Training


@dataclass(frozen=True)
class Routed:
    """What to draw."""

    metric: Metric
    """what stands on the value axis"""
    read: Callable[[Training], Mapping[float, Sequence[float]]]
    """place on the other axis -> values there, which are averaged with those of the other seeds; places are layers or shares"""
    along: Across
    """the other axis; sequence lengths where it is logarithmic, over which a panel then runs"""
    words: str
    """what the caption says of it"""

    def data(self, table: pd.DataFrame) -> pd.DataFrame:
        """One row a series, panel and place `n`: mean `value`, range `low` to `high` over what is averaged, `seeds`, `status`."""
        if table.empty or earned.TASK not in set(table["task"]):
            return pd.DataFrame()
        rows = earned.asked(frame.current(table))
        rows = rows[~rows["method"].map(series.exact)] if len(rows) else rows
        points = [p for _, part in rows.groupby(["panel", "series", "n"], sort=True) for p in self._points(part)]
        return asked_at_several(pd.DataFrame(points)) if points and self.along.powers else pd.DataFrame(points)

    def _points(self, part: pd.DataFrame) -> Iterator[dict[str, Any]]:
        good, failed = part[part["status"] == "ok"], part.loc[part["status"] != "ok", "status"].tolist()
        read = [self.read(training) for training in good["training"]]
        first, n = part.iloc[0], int(part["n"].iloc[0])
        for place in sorted({place for found in read for place in found}):
            values = [] if failed else [value for found in read for value in found.get(place, ())]
            panel = str(first["panel"]) + ("" if self.along.powers else f", N={n}")
            yield spread(part, values, panel=panel, n=n if self.along.powers else place, status=failed[0] if failed else "ok")

    def build(self, table: pd.DataFrame, columns: int = 2) -> Figure | None:
        """The figure; None where no trained model routed."""
        drawn = self.data(table)
        if drawn.empty or not (drawn["status"] == "ok").any():
            return None
        below = f"Less than {self.metric.least:g} is below the axes." if cut(drawn, self.metric) else ""
        told = caption(table, drawn, before=f"{self.words} {below}".strip(), after=failures(drawn))
        with paper():
            order = sorted(drawn["panel"].unique(), key=series.natural)
            return draw(drawn, told, self.metric, columns, order=order, along=self.along)
