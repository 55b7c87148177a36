"""Trained accuracy as tables: what each method reached on each task, and what it costs at the same length and parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from attnbench import frame, joining, series
from attnbench.case import Case

if TYPE_CHECKING:
    from collections.abc import Sequence

TASK = joining.TRAINED
NONE = "\N{EN DASH}"
"""A cell for which there is no record."""
_SETTINGS = ("steps", "depth", "rates", "positions", "short_conv", "model", "recipe", "batch")
_ALL = "all steps"
_UNSAID = {f.name: f.default for f in fields(Case)}
"""what a record means that leaves a setting out"""
_COSTS = {"time_s": (1e3, "ms"), "peak_bytes": (2**-20, "MiB")}
"""column of a measured row -> factor and unit in which it is shown"""


@dataclass(frozen=True)
class Cell:
    """A method on one task at one length, over seeds."""

    values: tuple[float, ...]
    """accuracy of each seed that was trained"""
    failed: tuple[str, ...]
    """status of each seed that was not"""
    wanted: int = 0
    """seeds of the method that was trained with most; fewer here are still to come"""

    def __str__(self) -> str:
        count = len(self.values) + len(self.failed)
        if self.failed or not self.values:
            part = f" in {len(self.failed)} of {count}" if self.values else ""
            return f"{self.failed[0]}{part}" if self.failed else ""
        spread = f" ± {np.std(self.values, ddof=1):.3f}" if len(self.values) > 1 else ""
        return f"{np.mean(self.values):.3f}{spread}" + (f" ({count} of {self.wanted} seeds)" if count < self.wanted else "")


def asked(table: pd.DataFrame, *, swapped: bool = False) -> pd.DataFrame:
    """Rows that train, with the columns `panel` (what was asked, such as `mqar, causal`) and `series` (what a method is called).

    With `swapped` those that test a method in a model that was trained with another, else those tested as they were trained. `own` are
    parameters that the task does not set, `words` those of them that are no numbers and not at their defaults. Series are named by words;
    where these do not suffice by the budget that set the numbers, and only else by numbers.
    """
    rows = table[table["task"] == TASK] if len(table) else table
    if rows.empty:
        return rows.assign(panel="", series="", own="", words="")
    other = rows["trained_with"].fillna("") if "trained_with" in rows else rows["task"].map(lambda _: "")
    rows = rows.assign(trained_with=other)[(other != "") == swapped]
    if rows.empty:
        return rows.assign(panel="", series="", own="", words="")
    causal = [", causal" if frame.is_causal(p) else "" for p in rows["params"]]
    origin = [f", trained with {_origin(other)}" if other else "" for other in rows["trained_with"]]
    panels = [a + b + c for a, b, c in zip(rows["data"].map(titles(rows["data"])), causal, origin, strict=True)]
    rows = _parted(rows.assign(panel=panels, own=[json.dumps(joining.own(p), sort_keys=True) for p in rows["params"]]))
    rows = rows.assign(words=[_words(str(m), json.loads(own)) for m, own in zip(rows["method"], rows["own"], strict=True)])
    return rows.assign(series=series.labels(rows.assign(params=_telling(rows))))


def all_steps(rows: pd.DataFrame) -> str:
    """How many steps the panels `all steps` of rows that `asked` has named stand for; empty where there are none."""
    whole = rows[rows["panel"].str.contains(f", {_ALL}", regex=False)]
    told = []
    for panel, part in whole.groupby("panel", sort=True):
        pairs = sorted(set(zip(part["n"], part["steps"], strict=True)))
        told.append(f"{panel}: " + ", ".join(f"{steps:g} at N={n}" for n, steps in pairs))
    return "; ".join(told)


def titles(data: pd.Series[str]) -> dict[str, str]:
    """Task, `NAME`, `NAME:LEVEL` or `NAME:PATH` -> as it is printed: a folder by its own name where that tells it from the others."""
    short = {text: f"{name} ({PurePath(path).name})" if path else name for text in set(data) for name, _, path in [text.partition(":")]}
    return {text: name if list(short.values()).count(name) == 1 else text for text, name in short.items()}


def _origin(text: str) -> str:
    """`mita:topk=16` as it is printed."""
    name, _, params = text.partition(":")
    method = series.method_of(name.partition("@")[0])
    return (method.title if method else name) + (f" ({params.replace(':', ', ')})" if params else "")


def _parted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, panels split by settings of training that differ at one of their lengths: nothing is averaged over these.

    Where several lengths train for some numbers of steps each, and the largest differ, these are `all steps`.
    """
    for column in (c for c in _SETTINGS if c in rows):
        said = rows[column].where(rows[column].notna(), _UNSAID[column])
        values = said.map(lambda v: f"{v:g}" if isinstance(v, int | float) and v == v else str(v))  # noqa: PLR0124 (NaN)
        within = values.groupby([rows["panel"], rows["n"]]).transform("nunique") > 1
        if column == "steps":
            most = said.groupby([rows["panel"], rows["n"]]).transform("max").where(within)
            values = values.mask((said == most) & (most.groupby(rows["panel"]).transform("nunique") > 1), _ALL)
        several = within.groupby(rows["panel"]).transform("any")
        words = values.where(values == _ALL, f"{column}=" + values)
        rows = rows.assign(panel=rows["panel"].where(~several, rows["panel"] + ", " + words))
    return rows


def _telling(rows: pd.DataFrame) -> pd.Series[str]:
    """Parameters by which rows of one label are told apart, as JSON, the fewest that suffice everywhere."""
    words = rows["words"]
    budgets = [b[0] if isinstance(b, list | tuple) and b else 0 for b in rows["budget"]] if "budget" in rows else [0] * len(rows)
    shown = zip(words, budgets, _varied(rows), strict=True)
    by_budget = pd.Series([json.dumps(json.loads(w) | ({"budget": b} if b else numbers)) for w, b, numbers in shown], rows.index)
    found = rows["own"].copy()
    for _, part in rows.groupby("label", sort=True):
        for short in (words, by_budget):
            if _suffices(short, part):
                found[part.index] = short[part.index]
                break
    return found


def _varied(rows: pd.DataFrame) -> pd.Series[Any]:
    """Of each row the parameters that are neither switches nor words and differ among rows of its label."""
    own = rows["own"].map(json.loads)
    found: pd.Series[Any] = pd.Series(index=rows.index, dtype=object)
    for _, part in own.groupby(rows["label"], sort=True):
        differ = {k for params in part for k, v in params.items() if not isinstance(v, bool | str) and any(p.get(k) != v for p in part)}
        found[part.index] = [{k: v for k, v in params.items() if k in differ} for params in part]
    return found


def _words(name: str, params: dict[str, Any]) -> str:
    """Parameters that are no numbers and not at their defaults, as JSON."""
    method = series.method_of(name)
    usual = method.params().as_dict() if method else {}
    return json.dumps({k: v for k, v in params.items() if isinstance(v, bool | str) and v != usual.get(k)})


def _suffices(told: pd.Series[str], rows: pd.DataFrame) -> bool:
    return all(told[part.index].nunique() == part["own"].nunique() for _, part in rows.groupby(["panel", "n"], sort=True))


def cells(rows: pd.DataFrame) -> dict[tuple[str, str, int], Cell]:
    """(series, panel, N) -> accuracy over seeds, of rows that `asked` has named."""
    most = rows.groupby(["panel", "n"])["seed"].transform("nunique")
    found = {}
    for _, part in rows.assign(_most=most).groupby(["series", "panel", "n"], sort=True):
        name, panel, n = (part[key].iloc[0] for key in ("series", "panel", "n"))
        good = part["status"] == "ok"
        found[str(name), str(panel), int(n)] = Cell(
            tuple(part.loc[good, "accuracy"]) if good.any() else (), tuple(part.loc[~good, "status"]), int(part["_most"].iloc[0])
        )
    return found


@dataclass(frozen=True)
class Lines:
    """A table of text, a row for each method and length."""

    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    methods: tuple[str, ...] = ()
    """the method of each row"""
    notes: tuple[str, ...] = ()
    """where the numbers beside the accuracy come from"""


def lines(table: pd.DataFrame, others: pd.DataFrame) -> Lines:
    """A column for each task, then what the method costs and its distance from softmax attention, from records of `others`."""
    rows = asked(table)
    if rows.empty:
        return Lines()
    lengths, panels = sorted({int(n) for n in rows["n"]}), sorted(rows["panel"].unique(), key=series.natural)
    plain = {n: _plain(rows[rows["n"] == n]) for n in lengths}
    costs = {n: joining.costs(others, plain[n], n) for n in lengths}
    far = {n: joining.distances(others, plain[n], n) for n in lengths}
    profiles = series.panel_order({p for s in far.values() if s for p in s.rows.loc[s.rows["status"] == "ok", "profile"]})
    reached, found, methods = cells(rows), [], []
    for name, n, part in _ordered(rows):
        wanted = _plain(part)[["method", "label", "params"]].drop_duplicates("params")
        accuracy = [str(reached.get((name, panel, n), "")) or NONE for panel in panels]
        found.append((*_head(name, part), str(n), *accuracy, *_cost(costs[n], wanted), *_far(far[n], wanted, profiles)))
        methods.append(str(part["method"].iloc[0]))
    header = ("method", "family", "N", *panels, *(u for _, u in _COSTS.values()), "costs of", *(f"error, {p}" for p in profiles))
    told = [
        joining.told(what, ((f"N={n}", str(s), s.apart) for n, s in by_n.items() if s))
        for what, by_n in (("Time and memory", costs), ("Error", far))
    ]
    return Lines(header, tuple(found), tuple(methods), tuple(sentence for part in told for sentence in part))


def swapped(table: pd.DataFrame) -> Lines:
    """What is left of the accuracy of trained models when a method takes the place of theirs, and what it was before."""
    rows = asked(table, swapped=True)
    if rows.empty:
        return Lines()
    panels, reached = sorted(rows["panel"].unique(), key=series.natural), cells(rows)
    parts = _ordered(rows)
    found = [(*_head(name, p), str(n), *(str(reached.get((name, panel, n), "")) or NONE for panel in panels)) for name, n, p in parts]
    return Lines(("method", "family", "N", *panels), tuple(found), tuple(str(p["method"].iloc[0]) for *_, p in parts), (_before(rows),))


def before(rows: pd.DataFrame) -> pd.Series[float]:
    """Seed -> accuracy with the method trained with, of rows of one swapped panel and length; the mean where it has several models."""
    return _models(rows).groupby("seed")["accuracy_before"].mean()


def several_models(rows: pd.DataFrame) -> str:
    """Which seeds of swapped rows have several models, as where a run that went on trained again; empty where none has."""
    told = []
    for (panel, n), part in rows.groupby(["panel", "n"], sort=True):
        counts = _models(part)["seed"].value_counts().sort_index()
        if seeds := [str(seed) for seed in counts[counts > 1].index]:
            told.append(f"{panel}, N={n}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    return f"Trained more than once: {'; '.join(told)}." if told else ""


def _models(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a model: one is known by its seed and what it reached before the swap."""
    return rows[rows["status"] == "ok"].drop_duplicates(["seed", "accuracy_before"])


def _before(rows: pd.DataFrame) -> str:
    good = rows[rows["status"] == "ok"]
    told = [f"{panel}, N={n}: {Cell(tuple(before(part)), ())}" for (panel, n), part in good.groupby(["panel", "n"], sort=True)]
    return f"Before the swap: {'; '.join(told)}. {several_models(rows)}".strip()


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the bidirectional form where there are any: their costs are shown."""
    causal = rows["params"].map(frame.is_causal)
    return rows if causal.all() else rows[~causal]


def _head(name: str, part: pd.DataFrame) -> tuple[str, str]:
    return name, str(series.family(str(part["method"].iloc[0])) or "unknown")


def _found(source: joining.Source | None, wanted: pd.DataFrame) -> list[joining.Found]:
    pairs = wanted.itertuples(index=False, name=None) if source else ()
    return [f for pair in pairs if source and (f := source.find(*pair))]


def _cost(source: joining.Source | None, wanted: pd.DataFrame) -> tuple[str, ...]:
    """Time, memory, and whose they are; of several sets of numbers, one after another."""
    found = _found(source, wanted)
    if not found:
        return (*(NONE for _ in _COSTS), NONE)
    texts = [
        " / ".join(dict.fromkeys(f.status if f.status != "ok" else _number(factor * f.median(column)) for f in found))
        for column, (factor, _) in _COSTS.items()
    ]
    return (*texts, " / ".join(dict.fromkeys(f.differs or "the same" for f in found)))


def _far(source: joining.Source | None, wanted: pd.DataFrame, profiles: Sequence[str]) -> tuple[str, ...]:
    """Errors of equal parameters alone: a distance at others says nothing."""
    found = [f.by_profile("rel_error") for f in _found(source, wanted) if not f.differs]
    return tuple(" / ".join(dict.fromkeys(_number(f[p], 2) for f in found if p in f)) or NONE for p in profiles)


def _number(value: float, digits: int = 3) -> str:
    return NONE if np.isnan(value) else f"{value:.{digits}g}"


def _ordered(rows: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    """Series, N and its rows, shortest first, then in the taxonomy's order."""
    parts: list[tuple[str, int, Any]] = [
        (str(part["series"].iloc[0]), int(part["n"].iloc[0]), part) for _, part in rows.groupby(["series", "n"], sort=True)
    ]
    return sorted(parts, key=lambda x: (x[1], series.family_rank(series.family(str(x[2]["method"].iloc[0]))), series.natural(x[0])))
