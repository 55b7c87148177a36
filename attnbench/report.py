"""Results as tables to read: a table for each group of like conditions, metric, and mode or profile; a row a series, a column a length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnbench import frame, metrics, series
from attnbench.errors import UserError
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

_SHOWN = {"speed": ("mode", ("latency", "peak_memory")), "fidelity": ("profile", ("rel_error", "cosine", "mass_recalled"))}
"""Task -> the column that parts its tables, and the metrics shown."""


@dataclass(frozen=True)
class Section:
    """One table."""

    title: str
    """suite, mode or profile, metric and unit"""
    conditions: str
    rows: list[dict[str, str]]
    """`method`, then one value a length: three digits, the status of a cell that failed, or empty where none was run"""


def sections(table: pd.DataFrame) -> list[Section]:
    """Every table that the records allow. Raises `UserError` where nothing was measured."""
    current = frame.current(table) if not table.empty else table
    found = [section for group in (series.groups(current) if not current.empty else ()) for section in _group(group)]
    if not found:
        raise UserError("no cell of these results was measured: there is nothing to report")
    return found


def _group(group: series.Group) -> Iterator[Section]:
    rows = metrics.add(group.rows[group.rows["replicate"] == 0])
    rows = rows.assign(series=series.labels(rows))
    by, names = _SHOWN[str(rows["task"].iloc[0])]
    for value, part in rows.groupby(by, sort=True):
        for metric in (METRICS[name] for name in names):
            if part[metric.column].notna().any():
                title = f"{part['suite'].iloc[0]}, {value}: {metric.axis}"
                yield Section(title, series.describe(part), _rows(part, metric))


def _rows(part: pd.DataFrame, metric: metrics.Metric) -> list[dict[str, str]]:
    lengths = sorted(part["n"].unique())
    return [
        {"method": str(name), **{f"N={n}": _value(cells[cells["n"] == n], metric) for n in lengths}}
        for name, cells in part.groupby("series", sort=False)
        if cells[metric.column].notna().any() or (cells["status"] != "ok").all()
    ]


def _value(cell: pd.DataFrame, metric: metrics.Metric) -> str:
    """The median over seeds; a cell with a failure shows that."""
    failed = [str(status) for status in cell["status"] if status != "ok"]
    if cell.empty or failed:
        return failed[0] if failed else ""
    value = float(cell[metric.column].median()) / metric.divide
    return "" if math.isnan(value) else f"{value:.3g}"
