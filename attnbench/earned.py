"""The joined table of trained accuracy: what each method reached on each task, and what it costs at the same length and parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench import series, stats

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

TASK = "accuracy"
NONE = "\N{EN DASH}"
"""A cell for which there is no record."""
_TOLD = ("causal", "grid")
"""parameters that follow from the task asked"""
_SETTINGS = ("steps", "depth", "rates", "positions", "batch")
_COSTS = {"time_s": (1e3, "ms"), "peak_bytes": (2**-20, "MiB"), "rel_error": (1.0, "error")}
"""column of a measured row -> factor and unit in which it is shown"""


@dataclass(frozen=True)
class Cell:
    """A method on one task at one length, over seeds."""

    values: tuple[float, ...]
    """accuracy of each seed that was trained"""
    failed: tuple[str, ...]
    """status of each seed that was not"""

    def __str__(self) -> str:
        if self.failed or not self.values:
            return self.failed[0] if self.failed else ""
        spread = f" ± {np.std(self.values, ddof=1):.3f}" if len(self.values) > 1 else ""
        return f"{np.mean(self.values):.3f}{spread}"


def asked(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that train, with the columns `panel` (what was asked, such as `mqar, causal`) and `series` (what a method is called).

    Series are named by parameters that the task does not set, and by numbers only where words do not suffice.
    """
    rows = table[table["task"] == TASK]
    if rows.empty:
        return rows.assign(panel="", series="")
    params = [json.loads(p) for p in rows["params"]]
    swapped = rows["trained_with"].fillna("") if "trained_with" in rows else [""] * len(rows)
    panels = [
        data + (", causal" if p.get("causal") else "") + (f", trained with {other}" if other else "")
        for data, p, other in zip(rows["data"], params, swapped, strict=True)
    ]
    rows = _parted(rows.assign(panel=panels, own=[_own(p) for p in params]))
    return rows.assign(series=series.labels(rows.assign(params=_telling(rows))))


def _parted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, panels split by settings of training that differ within them: nothing is averaged over these."""
    for column in (c for c in _SETTINGS if c in rows):
        values = rows[column].fillna("default").astype(str)
        several = values.groupby(rows["panel"]).transform("nunique") > 1
        rows = rows.assign(panel=rows["panel"].where(~several, rows["panel"] + f", {column}=" + values))
    return rows


def _telling(rows: pd.DataFrame) -> pd.Series[str]:
    """Parameters by which rows are told apart: where words suffice, without numbers, which a budget sets anew for each task and length."""
    words = rows["own"].map(lambda text: json.dumps({k: v for k, v in json.loads(text).items() if isinstance(v, bool | str)}))
    short: set[str] = set()
    for _, part in rows.groupby(["label", "panel", "n"], sort=True):
        if words[part.index].nunique() < part["own"].nunique():
            short.add(str(part["label"].iloc[0]))
    return words.where(~rows["label"].isin(sorted(short)), rows["own"])


def cells(rows: pd.DataFrame) -> dict[tuple[str, str, int], Cell]:
    """(series, panel, N) -> accuracy over seeds, of rows that `asked` has named."""
    found = {}
    for _, part in rows.groupby(["series", "panel", "n"], sort=True):
        name, panel, n = (part[key].iloc[0] for key in ("series", "panel", "n"))
        good = part[part["status"] == "ok"]
        found[str(name), str(panel), int(n)] = Cell(tuple(good["accuracy"]), tuple(part.loc[part["status"] != "ok", "status"]))
    return found


def costs(table: pd.DataFrame, rows: pd.DataFrame, n: int) -> dict[str, str]:
    """What the method of `rows` costs at N on the same device, by unit: the median over forward records of equal method and parameters.

    Parameters that the task sets are not compared. Where tasks had it run with different numbers, their costs stand beside each other.
    Units for which there is no record are absent.
    """
    known = table["method"].eq(rows["method"].iloc[0]) & table["n"].eq(n) & table["task"].ne(TASK)
    near = table[known & table["status"].eq("ok") & table["mode"].eq("forward")]
    own = near["params"].map(lambda text: _own(json.loads(text)))
    found: dict[str, str] = {}
    for column, (factor, unit) in _COSTS.items():
        each = [near.loc[own == one, column].dropna().tolist() for one in sorted(rows["own"].unique())] if column in near else []
        if texts := dict.fromkeys(f"{factor * stats.median(values):.3g}" for values in each if values):
            found[unit] = " / ".join(texts)
    return found


def lines(table: pd.DataFrame) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of text: a row for each method and length, a column for each task, then its costs."""
    rows = asked(table)
    if rows.empty:
        return (), []
    panels, reached = sorted(rows["panel"].unique(), key=series.natural), cells(rows)
    found = []
    for (name, n), part in _ordered(rows):
        cost = costs(table, part, n)
        own = [str(reached.get((name, panel, n), "")) or NONE for panel in panels]
        found.append((name, str(series.family(str(part["method"].iloc[0])) or "unknown"), str(n), *own,
                      *(cost.get(unit, NONE) for _, unit in _COSTS.values())))  # fmt: skip
    return ("method", "family", "N", *panels, *(unit for _, unit in _COSTS.values())), found


def _ordered(rows: pd.DataFrame) -> Iterable[tuple[tuple[str, int], pd.DataFrame]]:
    """(series, N) and its rows, shortest first, then in the taxonomy's order."""
    parts: list[tuple[tuple[str, int], Any]] = [
        ((str(part["series"].iloc[0]), int(part["n"].iloc[0])), part) for _, part in rows.groupby(["series", "n"], sort=True)
    ]
    return sorted(parts, key=lambda x: (x[0][1], series.family_rank(series.family(str(x[1]["method"].iloc[0]))), series.natural(x[0][0])))


def _own(params: dict[str, Any]) -> str:
    """Parameters that the task does not set, as JSON."""
    return json.dumps({k: v for k, v in params.items() if k not in _TOLD}, sort_keys=True)
