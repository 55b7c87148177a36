"""From which length on is a method better than a baseline? With an interval, or with the reason why there is no such length."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from attnbench import frame, series
from attnbench.axes import CHOICES
from attnbench.crossing import Point, length, point
from attnbench.errors import UserError, unknown
from attnbench.stats import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

    from attnbench.crossing import Row
    from attnbench.stats import Floor, Interval

METRIC_NAMES = ("latency", "peak_memory")
"""What may cross: metrics of which less is better."""
_WORD = {"latency": ("faster", "slower"), "peak_memory": ("smaller", "larger")}
_TOO_LARGE = {"oom": "memory", "timeout": "time"}


class Answer(StrEnum):
    """What a search for a crossover found."""

    FROM = "from"
    """Better from a length on, up to the longest at which both were measured."""
    NEVER = "never in range"
    """Worse at the longest length, and both were measured up to the end of the range."""
    BEYOND = "beyond memory or time"
    """Not better up to the length at which the method or the baseline ran out of memory or time."""
    NOT_SEPARABLE = "not separable"
    """At the longest length neither is better beyond the noise."""
    NOT_MEASURED = "not measured"
    """There is no length at which both were measured, for another reason than size."""


@dataclass(frozen=True)
class Crossover:
    """One series against one baseline, under equal conditions, in one mode."""

    suite: str
    device: str
    mode: str
    conditions: str
    series: str
    baseline: str
    metric: str
    answer: Answer
    length: Interval | None
    """N with its 95% interval, for `from`; a bound at or below the shortest length is that length"""
    shortest: int | None
    """of the lengths at which both were measured"""
    longest: int | None
    ratio: Interval | None
    """metric over the baseline's at `longest`, with its 95% interval"""
    floor: Floor | None
    """A/A noise floor there"""
    note: str = ""
    """what else there is to know: who failed and where, earlier wins, gaps"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the named tuples become dicts, what is not finite becomes null."""
        parts = {name: getattr(self, name) for name in ("length", "ratio", "floor")}
        return asdict(self) | {name: _json(value._asdict()) if value is not None else None for name, value in parts.items()}

    def __str__(self) -> str:
        better = _WORD[self.metric][0]
        text = f"{self.series}, {self.mode}: {self._answer(better)}"
        if self.ratio and self.longest:
            r = self.ratio
            sure = f" (95% interval {r.low:.3g} to {r.high:.3g})" if r.low < r.high else ""
            text += f"; {r.value:.{3 if sure else 6}g} of {self.baseline} at N={self.longest}{sure}"
        return text + (f"; {self.note}" if self.note else "")

    def _answer(self, better: str) -> str:
        if self.length is None:
            return str(self.answer)
        low, at, high = (round(n) if math.isfinite(n) else n for n in self.length)
        if high <= (self.shortest or 0):
            return f"{better} throughout, from N={high} or less"
        at_most = "" if at > (self.shortest or 0) else " at most"
        return f"{better} from{at_most} N={at}" + (
            f" (95% interval {low} to {high if math.isfinite(high) else 'beyond the range'})" if low < high else ""
        )


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def find(table: pd.DataFrame, against: str, metric: str = "latency", mode: str | None = None) -> list[Crossover]:
    """Every series of the table's speed records against the baseline `method[@implementation]`, as the suite asked for it.

    Nothing is pooled: devices, suites, conditions and modes each have their own answer, and a causal series meets a causal baseline.
    Raises `UserError` for a baseline, metric or mode that the table lacks.
    """
    if metric not in METRIC_NAMES:
        raise unknown("metric", metric, METRIC_NAMES)
    if mode is not None and mode not in CHOICES["mode"]:
        raise unknown("mode", mode, CHOICES["mode"])
    rows = frame.current(table) if not table.empty else table
    rows = rows[rows["task"] == "speed"] if len(rows) else rows
    if rows.empty:
        raise UserError("these results hold no speed records: run a suite of the task speed first")
    if against not in set(rows["label"]):
        raise unknown("baseline", against, set(rows["label"]), "these results")
    found = [one for group in series.groups(rows) for one in _of_group(group, against, metric, mode)]
    if not found:
        raise UserError(f"no other method was measured beside {against}{f' in mode {mode}' if mode else ''}: name another baseline or mode")
    return found


def _of_group(group: series.Group, against: str, metric: str, mode: str | None) -> Iterator[Crossover]:
    rows = group.rows.assign(series=series.labels(group.rows))
    rows = rows[rows["replicate"] == 0]
    for each in CHOICES["mode"]:
        again = series.pairs(group.rows, each)
        part = rows[rows["mode"] == each] if mode in (None, each) else rows.iloc[:0]
        bases = [base for _, base in part[part["label"] == against].groupby("params", sort=True)]
        others = [own for _, own in part[part["label"] != against].groupby("series", sort=True)]
        others.sort(key=lambda own: (series.family_rank(series.family(own["method"].iloc[0])), series.natural(own["series"].iloc[0])))
        yield from (_search(own, base, metric, again) for own in others for base in bases if _causal(own) == _causal(base))


def _causal(rows: pd.DataFrame) -> bool:
    return frame.is_causal(str(rows["params"].iloc[0]))


def _search(own: pd.DataFrame, base: pd.DataFrame, metric: str, again: Sequence[tuple[float, float]]) -> Crossover:
    sides = [{int(row["n"]): {str(k): v for k, v in row.items()} for row in rows.to_dict("records")} for rows in (own, base)]
    lengths = sorted({*sides[0], *sides[1]})
    points = [p for n in lengths if (p := point(sides[0].get(n), sides[1].get(n), metric, again, n))]
    last = points[-1] if points else None
    answer, note = _judge(
        points, _failures(sides, lengths, last.n if last else 0, [str(own["series"].iloc[0]), str(base["series"].iloc[0])])
    )
    first = own.iloc[0]
    return Crossover(
        suite=str(first["suite"]),
        device=str(first["device"]),
        mode=str(first["mode"]),
        conditions=series.conditions(first),
        series=str(first["series"]),
        baseline=str(base["series"].iloc[0]),
        metric=metric,
        answer=answer,
        length=length(points) if answer is Answer.FROM else None,
        shortest=points[0].n if points else None,
        longest=last.n if last else None,
        ratio=last.ratio if last else None,
        floor=last.floor if last else None,
        note="; ".join([*note, *_history(points, metric, lengths)]),
    )


def _failures(sides: Sequence[Mapping[int, Row]], lengths: Sequence[int], after: int, names: Sequence[str]) -> list[tuple[str, str]]:
    """(status, sentence) of the first length beyond `after` at which each side was tried and failed."""
    found = []
    for name, rows in zip(names, sides, strict=True):
        row = next((rows[n] for n in lengths if n > after and n in rows and rows[n]["status"] != "ok"), None)
        if row is not None:
            status = str(row["reason"]).partition(" ")[0] if row["status"] == "skipped" else str(row["status"])
            found.append((status, f"{name} {_failed(status, str(row['reason']))} at N={row['n']}"))
    return found


def _failed(status: str, reason: str) -> str:
    return f"ran out of {_TOO_LARGE[status]}" if status in _TOO_LARGE else f"is {status} ({reason})" if reason else f"is {status}"


def _judge(points: Sequence[Point], failures: Sequence[tuple[str, str]]) -> tuple[Answer, list[str]]:
    """The answer, and the failures that limit it."""
    note = [sentence for _, sentence in failures]
    if points and points[-1].verdict is Verdict.FASTER:
        return Answer.FROM, note
    if any(status in _TOO_LARGE for status, _ in failures):
        return Answer.BEYOND, note
    if not points:
        return Answer.NOT_MEASURED, note
    return (Answer.NEVER if points[-1].verdict is Verdict.SLOWER else Answer.NOT_SEPARABLE), note


def _history(points: Sequence[Point], metric: str, lengths: Sequence[int]) -> list[str]:
    """Wins that were lost again at a longer length, and lengths within the range at which one side is missing."""
    better, worse = _WORD[metric]
    lost = [p.n for i, p in enumerate(points) if p.verdict is Verdict.FASTER and any(q.verdict is Verdict.SLOWER for q in points[i + 1 :])]
    have = {p.n for p in points}
    gaps = [n for n in lengths if points and points[0].n < n < points[-1].n and n not in have]
    found = [f"{better} at N={', '.join(map(str, lost))} and {worse} again beyond"] if lost else []
    return found + ([f"not measured on both sides at N={', '.join(map(str, gaps))}"] if gaps else [])
