"""Where records of different suites meet: what a configuration costs, and how far it is from softmax, measured elsewhere.

Records are joined on one device under one set of conditions at one length, so that what stands side by side can be compared. Which
records these are is chosen here, once for every table and figure, and is part of the answer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnbench import frame, series, stats

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

TRAINED = "accuracy"
"""The task whose rows are joined with those of the others."""
LAID = ("causal", "grid")
"""Parameters that follow from what a task asks, and not from how a method is set."""


def own(params: str) -> dict[str, Any]:
    """Parameters (JSON) that no task sets."""
    return {k: v for k, v in json.loads(params).items() if k not in LAID}


@dataclass(frozen=True)
class Found:
    """The records of one configuration."""

    rows: pd.DataFrame
    """of one label and one set of parameters, over seeds and input profiles where the task varies them"""
    differs: str
    """the parameters, where they are not those that were asked for"""

    @property
    def status(self) -> str:
        """`ok`, or the first failure."""
        failed = self.rows.loc[self.rows["status"] != "ok", "status"]
        return "ok" if failed.empty else str(failed.iloc[0])

    def median(self, column: str) -> float:
        """Over the rows; NaN where one failed or none has it."""
        values = self.rows[column].dropna().tolist() if column in self.rows else []
        return stats.median(values) if values and self.status == "ok" else float("nan")

    def by_profile(self, column: str) -> dict[str, float]:
        """Input profile -> median over seeds, in the suite's order; profiles with a failure are absent."""
        parts = {str(profile): part for profile, part in self.rows.groupby("profile", sort=True)}
        found = {p: Found(parts[p], "").median(column) for p in series.panel_order(parts)}
        return {p: value for p, value in found.items() if not math.isnan(value)}


@dataclass(frozen=True)
class Source:
    """Records of one group at one length, with which others are joined."""

    group: series.Group
    n: int
    causal: bool
    rows: pd.DataFrame
    asked: tuple[int, bool]
    """the length and the form that were asked for"""

    def __str__(self) -> str:
        return f"{self.group.suite} ({series.describe(self.rows)})"

    @property
    def apart(self) -> str:
        """How it differs from what was asked for; empty where it does not."""
        n, causal = self.asked
        form = "" if self.causal == causal else "the causal form" if self.causal else "the bidirectional form"
        return ", ".join(part for part in ("" if self.n == n else f"N={self.n}", form) if part)

    def find(self, method: str, label: str, params: str) -> Found | None:
        """The records of a configuration: of its implementation, else of the fastest; with its parameters, else the nearest numbers.

        None where the method is absent, or differs in parameters that are no numbers.
        """
        known = self.rows[self.rows["method"] == method]
        named = known[known["label"] == label]
        known = known if named.empty else named
        ranked = sorted((d, time, *key) for key, time in _times(known).items() if (d := distance(params, key[1])) is not None)
        if not ranked:
            return None
        away, _, label, chosen = ranked[0]
        rows = known[(known["label"] == label) & (known["params"] == chosen)]
        return Found(rows, _told(own(chosen), own(params)) if away else "")


def _times(rows: pd.DataFrame) -> dict[tuple[str, str], float]:
    """(label, parameters) -> median time, infinite where there is none."""
    parts = {(str(p["label"].iloc[0]), str(p["params"].iloc[0])): p for _, p in rows.groupby(["label", "params"], sort=True)}
    times = {key: Found(part, "").median("time_s") for key, part in parts.items()}
    return {key: math.inf if math.isnan(t) else t for key, t in times.items()}


def distance(a: str, b: str) -> float | None:
    """How far two sets of parameters (JSON) are apart: log2 ratios of numbers, summed; 0 where equal, None where words differ."""
    first, second = own(a), own(b)
    total = 0.0
    for key in sorted({*first, *second}):
        x, y = first.get(key), second.get(key)
        if x == y:
            continue
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (x, y)):
            return None
        total += abs(math.log2(max(float(x), 0.5)) - math.log2(max(float(y), 0.5)))  # type: ignore[arg-type]
    return total


def _told(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in found.items() if asked.get(k) != v)


def costs(table: pd.DataFrame, wanted: pd.DataFrame, n: int) -> Source | None:
    """Timed forward passes for the configurations of `wanted` (columns `device`, `method`, `label`, `params`) at N, or as near as there is.

    Of the groups and lengths that hold at least half as many of the methods as the fullest does: on the same device, at the nearest
    length, in the form asked for (causal or not), with most equal parameters, most methods, speed rather than fidelity, most equal
    conditions.
    """
    rows = _others(table, ("speed", "fidelity"))
    failed = rows["status"] != "ok"
    return _source(rows[failed | rows["time_s"].notna()] if "time_s" in rows else rows[failed], wanted, n)


def distances(table: pd.DataFrame, wanted: pd.DataFrame, n: int) -> Source | None:
    """Likewise, distances from softmax attention on every input profile and seed."""
    return _source(_others(table, ("fidelity",)), wanted, n)


def _others(table: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    rows = table[table["task"].isin(tasks) & table["mode"].eq("forward") & table["replicate"].eq(0)]
    return frame.current(rows) if len(rows) else rows


def _source(rows: pd.DataFrame, wanted: pd.DataFrame, n: int) -> Source | None:
    if rows.empty or wanted.empty:
        return None
    causal, methods = frame.is_causal(str(wanted["params"].iloc[0])), set(wanted["method"])
    options = [source for group in series.groups(rows) for source in _options(group, n, causal)]
    most = max(len(methods & set(source.rows["method"])) for source in options)
    good = [s for s in options if most and 2 * len(methods & set(s.rows["method"])) >= most]
    return max(good, key=lambda s: _rank(s, wanted), default=None)


def told(what: str, sources: Iterable[tuple[str, str, str]]) -> list[str]:
    """One sentence for each source: which records these are, and at what places (place, source, how far apart) they are not equal."""
    found: dict[str, list[str]] = {}
    for place, source, apart in sources:
        found.setdefault(source, []).append(f"{place} from {apart}" if apart else "")
    return [f"{what}: forward pass, {group}, {_listed(apart)}." for group, apart in found.items()]


def _listed(apart: Sequence[str]) -> str:
    equal = ["at equal N"] if "" in apart else []
    return "; ".join([*equal, *(text for text in apart if text)])


def _options(group: series.Group, n: int, causal: bool) -> Iterable[Source]:
    """The group at each length, in the form asked for where it has that, else in the other."""
    form = group.rows["params"].map(frame.is_causal)
    for length in sorted(group.rows["n"].unique()):
        here = group.rows["n"] == length
        there = causal if (here & (form == causal)).any() else not causal
        yield Source(group, int(length), there, group.rows[here & (form == there)], (n, causal))


def _rank(source: Source, wanted: pd.DataFrame) -> tuple[Any, ...]:
    n, causal = source.asked
    first, here = wanted.iloc[0], source.rows.iloc[0]
    equal = len(_configurations(source.rows) & _configurations(wanted))
    shared = sum(here[c] == first[c] for c in ("batch", "heads", "dim", "dtype"))
    near = -abs(math.log2(source.n / n))
    methods = len(set(source.rows["method"]) & set(wanted["method"]))
    place = here["device"] == first["device"], near, source.causal == causal
    return *place, equal, methods, here["task"] == "speed", shared, not here["graph"]


def _configurations(rows: pd.DataFrame) -> set[tuple[str, str]]:
    pairs = rows[["method", "params"]].drop_duplicates().itertuples(index=False, name=None)
    return {(method, json.dumps(own(params), sort_keys=True)) for method, params in pairs}


def errors(rows: pd.DataFrame) -> dict[tuple[str, str, str], dict[int, float]]:
    """(device, method, parameters) -> length -> median relative error over input profiles and seeds."""
    known = rows[(rows["task"] == "fidelity") & rows["rel_error"].notna()] if "rel_error" in rows else rows.iloc[:0]
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for _, part in known.groupby(["device", "method", "params", "n"], sort=True) if len(known) else ():
        first = part.iloc[0]
        key = (str(first["device"]), str(first["method"]), str(first["params"]))
        found.setdefault(key, {})[int(first["n"])] = float(part["rel_error"].median())
    return found


def nearest(known: Mapping[int, float], n: int) -> tuple[float | None, int | None]:
    """The value at the length nearest to N, and that length; (None, None) where there is none."""
    at = min(known, key=lambda other: abs(other - n), default=None)
    return (None, None) if at is None else (known[at], at)


def closest(accuracy: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Of fidelity rows the group that shares most conditions with `rows`: groups are never pooled."""
    groups = list(series.groups(accuracy)) if len(accuracy) else []
    shared = [sum(g.rows[c].iloc[0] == rows[c].iloc[0] for c in series.CONDITIONS) for g in groups]
    return groups[shared.index(max(shared))].rows if groups else accuracy
