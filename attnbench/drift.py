"""Drift: how far a cell comes out from itself when the same environment measures it again hours or days later.

The A/A noise floor is taken within one run; drift says what it leaves out. Where the two attempts ran different commits, what looks like
drift may be a change of the code, and is marked so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from attnbench import frame, series, stats
from attnbench.stats import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from attnbench.stats import Floor, Interval

_CELL = ["suite", "device", "env_id", "case_id"]


@dataclass(frozen=True)
class Drift:
    """The first and the last measurement of one cell in one environment."""

    suite: str
    device: str
    series: str
    mode: str
    n: int
    conditions: str
    replicate: int
    first: str
    """UTC, ISO 8601"""
    last: str
    hours: float
    """between them"""
    commits: tuple[str, ...]
    """of the two; one where it is the same"""
    attempts: int
    """measurements of the cell in all"""
    time_first_s: float
    """median"""
    time_last_s: float
    ratio: Interval
    """`time last / time first` with its 95% interval"""
    floor: Floor | None
    """A/A noise floor of the suite at that duration"""
    verdict: Verdict
    """what the last is, seen from the first"""

    @property
    def apart(self) -> float:
        """How far the two are apart, as a share: `max / min - 1`."""
        return max(self.ratio.value, 1 / self.ratio.value) - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the named tuples become dicts."""
        return asdict(self) | {"ratio": self.ratio._asdict(), "floor": self.floor._asdict() if self.floor else None}

    def __str__(self) -> str:
        r = self.ratio
        again = f" #{self.replicate}" if self.replicate else ""
        noise = f"noise floor {self.floor}" if self.floor else "noise floor not measured"
        code = "same commit" if len(self.commits) == 1 else f"commits {' and '.join(self.commits)}"
        return (
            f"{self.series}, {self.mode}, N={self.n}{again}: {self.verdict} {self.hours:.1f} hours later "
            f"(last/first {r.value:.3f}, 95% interval {r.low:.3f} to {r.high:.3f}, {noise}, {code})"
        )


def find(attempts: pd.DataFrame) -> list[Drift]:
    """Every cell of `attnbench.frame.load(..., attempts=True)` that one environment measured at different times, the furthest apart first.

    Several such tables may be joined: an attempt that two of them hold counts once.
    """
    if attempts.empty:
        return []
    measured = attempts[attempts["time_s"].notna()].drop_duplicates([*_CELL, "started"]).sort_values("started", kind="stable")
    found = [one for _, rows in measured.groupby(["suite", "device"], sort=True) for one in _of(rows)]
    return sorted(found, key=lambda one: -one.apart)


def _of(rows: pd.DataFrame) -> Iterator[Drift]:
    current = frame.current(rows)
    again = {str(mode): series.pairs(current, str(mode)) for mode in current["mode"].unique()}
    for _, cell in rows.assign(series=series.labels(rows)).groupby(_CELL, sort=False):
        if len(cell) > 1:
            records = [{str(k): v for k, v in row.items()} for row in cell.to_dict("records")]
            yield _between(records[0], records[-1], len(cell), again[records[0]["mode"]])


def _between(first: dict[str, Any], last: dict[str, Any], attempts: int, again: Sequence[tuple[float, float]]) -> Drift:
    ratio = stats.ratio(first["samples_s"], last["samples_s"])
    floor = stats.floor(again, min(first["time_s"], last["time_s"]))
    begun = [datetime.fromisoformat(str(row["started"])) for row in (first, last)]
    return Drift(
        suite=str(first["suite"]),
        device=str(first["device"]),
        series=str(first["series"]),
        mode=str(first["mode"]),
        n=int(first["n"]),
        conditions=series.conditions(first),
        replicate=int(first["replicate"]),
        first=str(first["started"]),
        last=str(last["started"]),
        hours=(begun[1] - begun[0]).total_seconds() / 3600,
        commits=tuple(dict.fromkeys(str(row["commit"]) for row in (first, last))),
        attempts=attempts,
        time_first_s=float(first["time_s"]),
        time_last_s=float(last["time_s"]),
        ratio=ratio,
        floor=floor,
        verdict=stats.verdict(ratio, floor),
    )


def summary(found: Sequence[Drift]) -> str:
    """All of it in a sentence; empty where no cell was measured again."""
    if not found:
        return ""
    hours, furthest = sorted(one.hours for one in found), max(found, key=lambda one: one.apart)
    beyond = sum(one.verdict is not Verdict.NOT_SEPARABLE for one in found)
    changed = sum(len(one.commits) > 1 for one in found)
    return (
        f"drift: {len(found)} {'cell was' if len(found) == 1 else 'cells were'} measured again in the same environment, {hours[0]:.1f} to "
        f"{hours[-1]:.1f} hours later: median {stats.median([one.apart for one in found]):.1%} apart, {beyond} beyond the A/A noise floor, "
        f"furthest {furthest.apart:.0%} ({furthest.series}, {furthest.mode}, N={furthest.n})"
        + (f"; {changed} ran another commit" if changed else "")
    )
