"""What a results table says, in five sentences, and one more where models were trained, each computed from its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series, stats, typeset
from attnbench.stats import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class _Field:
    """The measured rows of one group and mode, those of exact methods, and the A/A pairs that say how far apart times must be."""

    group: series.Group
    mode: str
    rows: pd.DataFrame
    again: list[tuple[float, float]]

    @property
    def lengths(self) -> list[int]:
        return sorted(int(n) for n in self.rows["n"].unique())

    def at(self, n: int) -> list[dict[str, Any]]:
        """Rows of one length, the fastest first."""
        found = [{str(k): v for k, v in row.items()} for row in self.rows[self.rows["n"] == n].to_dict("records")]
        return sorted(found, key=lambda row: float(row["time_s"]))

    def dense(self, n: int) -> dict[str, Any] | None:
        """The fastest exact method."""
        return next((row for row in self.at(n) if series.exact(row["method"])), None)

    def faster(self, row: dict[str, Any], than: dict[str, Any]) -> bool:
        """Whether one time is below another by more than chance and the noise floor."""
        floor = stats.floor(self.again, min(float(row["time_s"]), float(than["time_s"])))
        apart = stats.verdict(stats.ratio(than["samples_s"], row["samples_s"]), floor) is not Verdict.NOT_SEPARABLE
        return apart and float(row["time_s"]) < float(than["time_s"])

    @property
    def conditions(self) -> str:
        return f"{self.group.suite}, {self.mode}, {series.describe(self.rows)}"


def sentences(table: pd.DataFrame) -> list[str]:
    """What was run, what is fastest, from which length, what needs least memory, what stays closest to softmax, and what learns best.

    Speed is told of the group (suite, device, conditions) and mode with the most measured methods, at its greatest length.
    """
    rows = frame.current(table)
    field = _widest(rows)
    return [_extent(rows), *(_speed(field) if field else _unmeasured()), _accuracy(rows), *_trained(rows)]


def subject(table: pd.DataFrame) -> tuple[str, str]:
    """Suite and conditions of the group that the sentences tell the speed of; two empty texts where none was measured."""
    field = _widest(frame.current(table))
    return (field.group.suite, series.describe(field.group.rows)) if field else ("", "")


def _extent(rows: pd.DataFrame) -> str:
    counts = rows["status"].value_counts()
    rest = ", ".join(f"{int(n)} {status}" for status, n in counts.items() if status != "ok")
    suites, devices = sorted(rows["suite"].unique()), sorted(str(d) or "unknown device" for d in rows["device"].unique())
    return (
        f"{len(rows)} cells of {rows['method'].nunique()} methods were tried in {_count(suites, 'suite')} ({', '.join(suites)}) on "
        f"{' and '.join(devices)}: {int(counts.get('ok', 0))} measured{f', {rest}' if rest else ''}."
    )


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _widest(rows: pd.DataFrame) -> _Field | None:
    measured = rows[(rows["task"] == "speed") & rows["time_s"].notna() & (rows["replicate"] == 0)]
    found = []
    for group in series.groups(rows[rows["task"] == "speed"]):
        for mode in series.panel_order(group.rows["mode"].unique()):
            part = measured[measured.index.isin(group.rows.index) & (measured["mode"] == mode)]
            if len(part):
                found.append(_Field(group, mode, part.assign(series=series.labels(part)), series.pairs(group.rows, mode)))
    return max(found, key=lambda f: (f.rows["method"].nunique(), len(f.rows)), default=None)


def _unmeasured() -> list[str]:
    return ["No speed was measured.", "So no method overtakes another.", "Nor is their memory known."]


def _speed(field: _Field) -> list[str]:
    return [_fastest(field), _overtaking(field), _least(field)]


def _fastest(field: _Field) -> str:
    top = field.lengths[-1]
    ranked, dense = field.at(top), field.dense(top)
    best = ranked[0]
    near = [row["series"] for row in ranked[1:] if not field.faster(best, row)]
    text = f"Fastest at N={top} ({field.conditions}) is {best['series']} with {typeset.figures(best['time_s'] * 1e3)} ms a call"
    if dense is None:
        text += ", where no exact method was measured"
    elif dense["series"] != best["series"]:
        ratio = f"{typeset.figures(dense['time_s'] / best['time_s'])} times as fast as the best exact method, {dense['series']}"
        text += f", {ratio}" if field.faster(best, dense) else f", not separable from the best exact method, {dense['series']}"
    return text + (f"; not separable from it: {', '.join(near)}." if near else ".")


def _overtaking(field: _Field) -> str:
    for n in field.lengths:
        dense = field.dense(n)
        winners = [r["series"] for r in field.at(n) if dense and not series.exact(r["method"]) and field.faster(r, dense)] if dense else []
        if winners:
            others = f" (with {len(winners) - 1} more at that length)" if len(winners) > 1 else ""
            return f"The first to run separably faster than the best exact method as N grows is {winners[0]}, from N={n}{others}."
    return "No other method runs separably faster than the best exact method at any length where both were measured."


def _least(field: _Field) -> str:
    known = [row for n in field.lengths[-1:] for row in field.at(n) if row.get("peak_bytes") == row.get("peak_bytes") is not None]
    if not known:
        return "Peak memory was not measured there."
    ranked = sorted(known, key=lambda row: float(row["peak_bytes"]))
    low, high = ranked[0], ranked[-1]
    sizes = [typeset.figures(float(row["peak_bytes"]) / 2**20) for row in (low, high)]
    same = sum(float(row["peak_bytes"]) == float(low["peak_bytes"]) for row in ranked) - 1
    others = f" (and {same} more)" if same else ""
    return f"Beside its inputs {low['series']}{others} needs least memory there, {sizes[0]} MiB, and {high['series']} most, {sizes[1]} MiB."


def _accuracy(rows: pd.DataFrame) -> str:
    if "rel_error" not in rows or rows["rel_error"].isna().all():
        return "No distance from softmax attention was measured."
    known = rows[(rows["task"] == "fidelity") & (rows["status"] == "ok") & rows["rel_error"].notna()]
    known = known[~known["method"].map(series.exact)]
    if known.empty:
        return "Only exact methods were held against softmax attention."
    n = int(known["n"].max())
    part = known[known["n"] == n]
    errors = part.assign(series=series.labels(part)).groupby("series")["rel_error"].median().sort_values()
    profiles = series.panel_order(part["profile"].unique())
    return (
        f"Of {len(errors)} inexact configurations, {errors.index[0]} stays closest to softmax attention at N={n}, with a median relative "
        f"error of {errors.iloc[0]:.2g} over {_count(profiles, 'input profile')} ({', '.join(profiles)}); {errors.index[-1]} is farthest, "
        f"with {errors.iloc[-1]:.2g}."
    )


def _trained(rows: pd.DataFrame) -> list[str]:
    """The mean over tasks and lengths that every configuration of a group learned, so that none is judged by easier ones."""
    found = [(group, _learned(group.rows)) for group in series.groups(rows[rows["task"] == earned.TASK])]
    found = [(group, means) for group, means in found if len(means) and means.shape[1] > 1]
    if not found:
        return []
    group, means = max(found, key=lambda one: one[1].shape[1])
    mean = means.mean().sort_values(ascending=False, kind="stable")
    dense = [name for name, method in mean.index[1:-1] if series.exact(method)][:1]
    tasks = sorted((f"{panel}, N={n}" for panel, n in means.index), key=series.natural)
    between = "".join(f", {name} at {mean.xs(name).iloc[0]:.3f}" for name in dense)
    where = f"{group.suite}, {group.rows['device'].iloc[0]}: {'; '.join(tasks)}"
    return [
        f"Of {len(mean)} configurations trained on {_count(tasks, 'task')} ({where}) {mean.index[0][0]} is the most accurate on average, "
        f"{mean.iloc[0]:.3f}{between}, and {mean.index[-1][0]} the least, {mean.iloc[-1]:.3f}."
    ]


def _learned(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over seeds: a row for each task and length that all learned, a column for each (series, method)."""
    asked = earned.asked(rows)
    asked = asked[asked["steps"] > 1] if len(asked) else asked
    if asked.empty or "accuracy" not in asked:
        return pd.DataFrame()
    values = asked["accuracy"].where(asked["status"] == "ok")
    cells = values.groupby([asked[c] for c in ("panel", "n", "series", "method")]).agg(lambda seeds: seeds.mean(skipna=False))
    return cells.unstack(["series", "method"]).dropna()
