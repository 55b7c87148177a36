"""A metric against sequence length, in panels: what most figures are. Failures stand at their length, above the axes.

Of one length a row a series is drawn instead, with failures in their rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from attnbench import frame, metrics, references, series, stats
from attnbench.figures import _dots
from attnbench.figures._multiples import baseline, draw, failures
from attnbench.figures._style import paper
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Facets:
    """What to draw."""

    metric: str
    by: str
    """column that gives the panels: `mode` or `profile`"""
    task: str
    dense: bool = True
    """whether exact methods are drawn, and their best repeated in the other families' panels; else the caption sums them up"""

    def data(self, table: pd.DataFrame) -> pd.DataFrame:
        """What is drawn, one row a point or failure, in the axis's unit.

        `kind` is `series`, `baseline` (the best exact method at each length), `exact` (in the caption only) or `cited` (measured
        elsewhere; `ran` says where). `low` and `high` are quartiles where the metric is of time, else the range over seeds. `floor` is
        the A/A noise floor, where the series was measured twice. Points and failures of one series over several seeds count as failed
        unless every seed is `ok`. Captured inputs of one length have no line; the figure `inputs` has them.
        """
        if table.empty:
            return pd.DataFrame()
        series.one_device(table)
        rows = frame.current(table)
        rows = rows[rows["task"] == self.task]
        if self.by == "profile" and len(rows):
            rows = rows[~_of_one_length(rows)]
        if rows.empty:
            return pd.DataFrame()
        points = self._points(rows)
        if not any(p["status"] == "ok" for p in points):
            return pd.DataFrame()
        return pd.DataFrame([*points, *baseline(points, self.metric), *self._cited(rows)])

    def _cited(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        metric = METRICS[self.metric]
        found = references.beside(rows, metric.column) if self.by == "mode" else []
        measured = set(rows["n"])
        several = len({json.dumps(one.params, sort_keys=True) for one in found}) > 1
        return [
            {
                "kind": "cited", "panel": one.mode, "family": str(series.family(one.method) or "other"),
                "series": f"{one.name(settings=several)}, cited", "label": f"{one.method}@cited", "method": one.method,
                "params": json.dumps(one.params, sort_keys=True), "ran": one.source, "n": n, "value": value / metric.divide,
                "low": np.nan, "high": np.nan, "status": "ok", "floor": np.nan,
            }
            for one in found
            for n, value in one.values.items()
            if n in measured or len(measured) > 1  # a single length has no axis on which others stand
        ]  # fmt: skip

    def _points(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        metric = METRICS[self.metric]
        rows = rows.assign(series=series.labels(rows), **self._range(rows))
        titles = series.profile_titles(rows["profile"]) if self.by == "profile" else {}
        pairs = {str(mode): series.pairs(rows, str(mode)) for mode in rows["mode"].unique()}
        again = set(rows.loc[rows["replicate"] > 0, "series"])
        found: list[dict[str, Any]] = []
        for (panel, *_), cell in rows[rows["replicate"] == 0].groupby([self.by, "series", "n"], sort=True):
            failed = [s for s in cell["status"] if s != "ok"]
            value = np.nan if failed else float(cell["_value"].median()) / metric.divide
            if not failed and np.isnan(value):
                continue  # measured, but this metric does not exist for it
            first = cell.iloc[0]
            family = series.family(str(first["method"]))
            banded = metric.of_time and first["series"] in again and not failed
            noise = stats.floor(pairs[first["mode"]], float(first["time_s"])) if banded else None
            found.append({
                "kind": "series" if self.dense or not series.exact(str(first["method"])) else "exact",
                "panel": titles.get(str(panel), str(panel)), "family": str(family or "other"), "series": first["series"],
                "label": first["label"], "method": first["method"], "params": first["params"], "ran": first["implementation"],
                "n": int(first["n"]), "value": value, "low": np.nan if failed else float(cell["_low"].min()) / metric.divide,
                "high": np.nan if failed else float(cell["_high"].max()) / metric.divide,
                "status": failed[0] if failed else "ok",
                "floor": noise.relative if noise else np.nan,
            })  # fmt: skip
        return found

    def _range(self, rows: pd.DataFrame) -> dict[str, pd.Series[float]]:
        metric = METRICS[self.metric]
        value = metrics.add(rows)[metric.column]
        if metric.of_time is None or "samples_s" not in rows:
            return {"_value": value, "_low": value, "_high": value}
        samples = [s if isinstance(s, tuple) else (np.nan,) for s in rows["samples_s"]]
        ends = [metric.at(rows, pd.Series([np.quantile(s, q) for s in samples], rows.index)) for q in (0.25, 0.75)]
        return {"_value": value, "_low": pd.concat(ends, axis=1).min(axis=1), "_high": pd.concat(ends, axis=1).max(axis=1)}

    def build(self, table: pd.DataFrame, columns: int = 2) -> Figure | None:
        """The figure, as wide as `columns` columns of a page; None where the table has nothing for it.

        Raises `ValueError` where the table mixes conditions: split it with `attnbench.series.groups` first.
        """
        drawn = self.data(table)
        if drawn.empty:
            return None
        rows = table[table["task"] == self.task]
        if len(list(series.groups(rows))) > 1:
            raise ValueError("the table mixes devices, suites or conditions: split it with attnbench.series.groups")
        with paper():
            return self._drawing(drawn)(drawn, self._caption(drawn, rows), METRICS[self.metric], columns)

    def _drawing(self, drawn: pd.DataFrame) -> Callable[..., Figure]:
        return _dots.draw if self._single(drawn) else draw

    def _single(self, drawn: pd.DataFrame) -> bool:
        """Whether series are rows, not lines."""
        return bool(drawn["n"].nunique() == 1)

    def _caption(self, drawn: pd.DataFrame, rows: pd.DataFrame) -> str:
        metric = METRICS[self.metric]
        parts = [f"{series.describe(rows)}. {series.settings(rows[rows['label'].isin(drawn['label'])])}".strip()]
        if metric.of_time:
            parts.append(("Whole" if self.metric == "latency" else "From whole") + "-method time, median with quartiles.")
        elif rows["seed"].nunique() > 1:
            parts.append(f"Median and range over {rows['seed'].nunique()} seeds.")
        if self.metric == "energy":
            parts.append(f"Whole GPU, calls back to back; idle power of {_span(rows['idle_w'].dropna(), 3)} W subtracted.")
            parts.append(series.earlier(frame.current(rows), "metered_s", "Metered"))
        noise = series.noise(frame.current(rows)) if drawn["floor"].notna().any() else ""
        if noise:
            parts.append(f"Shaded band: A/A noise floor {noise}, drawn around the series that was measured twice.")
        if self.metric == "efficiency" and (drawn["value"] > 1).any():
            parts.append("Above 1: the floor counts every read of a gathered row at the rate of memory, and caches serve repeated ones.")
        if (drawn["kind"] == "baseline").any():
            parts.append(f"Grey: the best dense method{'' if self._single(drawn) else ' at each length'}.")
        cited = drawn[drawn["kind"] == "cited"]
        if len(cited):
            lines = "" if self._single(drawn) else " on dotted lines"
            parts.append(f"Hollow markers{lines}: cited, not measured here. {'. '.join(sorted(cited['ran'].unique()))}.")
        exact = drawn[(drawn["kind"] == "exact") & (drawn["status"] == "ok")]
        if len(exact):
            parts.append(f"Not drawn: exact methods ({', '.join(sorted(exact['series'].unique()))}), at {_span(exact['value'])}.")
        where = "Letters" if self._single(drawn) else "Above the axes"
        parts.append(failures(drawn[drawn["kind"] == "series"], where))
        return " ".join(part for part in parts if part)


def _of_one_length(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether each row is of inputs from a file that were read at one length alone."""
    lengths: pd.Series[int] = rows.groupby("profile")["n"].transform("nunique")
    return rows["profile"].str.startswith(series.FILE) & (lengths == 1)


def _span(values: pd.Series[float], digits: int = 2) -> str:
    low, high = (f"{float(end):.{digits}g}" for end in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
