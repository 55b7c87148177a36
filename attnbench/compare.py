"""Two results, or two methods of one result, cell by cell: is B faster than A, slower, or not separable from it?"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attnbench import frame, series, stats
from attnbench.errors import UserError, unknown
from attnbench.series import CONDITIONS
from attnbench.stats import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd

    from attnbench.stats import Floor, Interval

ABSENT, UNTIMED = "absent", "untimed"
"""Status of a side that has no record of the cell, or one without a clock."""

_CELL = ("label", "params", "task", "mode", "n", *CONDITIONS)


@dataclass(frozen=True)
class Comparison:
    """One cell on both sides. Times and ratio exist only where both sides were measured."""

    suite: str
    device: str
    """`A's / B's` where they differ"""
    series_a: str
    series_b: str
    mode: str
    n: int
    profile: str
    """of the inputs"""
    conditions: str
    """all of them, the profile too"""
    status_a: str
    """a record's status, or `absent`"""
    status_b: str
    time_a_s: float | None
    """median"""
    time_b_s: float | None
    ratio: Interval | None
    """`time b / time a` with its 95% interval"""
    floor: Floor | None
    """the larger of the two sides' noise floors at the faster time; None where no A/A pair or only one side was measured"""
    verdict: Verdict | None
    """what B is, seen from A; None where a side was not measured"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the named tuples become dicts."""
        named = {k: v._asdict() if v is not None else None for k, v in (("ratio", self.ratio), ("floor", self.floor))}
        return asdict(self) | named

    @property
    def cell(self) -> str:
        """Where both sides stand."""
        series = f"{self.series_a} | {self.series_b}" if self.series_a != self.series_b else self.series_a
        return f"{self.suite}: {series}, {self.mode}, N={self.n}, {self.profile}"

    @property
    def outcome(self) -> str:
        """What B is, or why nothing can be said."""
        if self.ratio is None or self.verdict is None:
            return f"A {self.status_a}, B {self.status_b}"
        noise = f"noise floor {self.floor}" if self.floor else "noise floor not measured"
        r = self.ratio
        return f"B is {self.verdict} (B/A {r.value:.3f}, 95% interval {r.low:.3f} to {r.high:.3f}, {noise})"

    def __str__(self) -> str:
        return f"{self.cell}: {self.outcome}"


def results(a: pd.DataFrame, b: pd.DataFrame) -> list[Comparison]:
    """Every cell of two tables, paired by suite, device and case; a cell that only one has is `absent` on the other.

    Where each side holds one device (or suite) and they differ, they are put against each other; several that differ are not.
    """
    for side, table in (("A", a), ("B", b)):
        if table.empty:
            raise UserError(f"{side} holds no records: run a suite first")
    a, b = frame.current(a), frame.current(b)
    keys = [name for name in ("suite", "device") if not _lone(a, b, name)]
    left, right = (_Side(table, series.labels(table), _again(table)) for table in (a, b))
    return _paired(left, right, [*keys, *_CELL])


def lines(found: Sequence[Comparison]) -> Iterator[str]:
    """The comparisons as lines no two of which name the same cell; then how many cells one side lacks, a line for each reason."""
    both = [one for one in found if ABSENT not in (one.status_a, one.status_b)]
    alike = Counter(one.cell for one in both)
    for one in both:
        more = f", {one.device}, {one.conditions}" if alike[one.cell] > 1 else ""
        yield f"{one.cell}{more}: {one.outcome}"
    for side, of in (("A", lambda one: (one.status_a, one.series_a)), ("B", lambda one: (one.status_b, one.series_b))):
        for (suite, why), count in sorted(_lacking(found, of).items()):
            yield f"{suite}: {side} absent from {count} {'cell' if count == 1 else 'cells'}: {why}"


def _lacking(found: Sequence[Comparison], of: Callable[[Comparison], tuple[str, str]]) -> Counter[tuple[str, str]]:
    """How many cells a side lacks, by suite and reason; `of` gives its status and series in a comparison."""
    had = {(one.suite, of(one)[1]) for one in found if of(one)[0] != ABSENT}
    suites = {suite for suite, _ in had}

    def why(suite: str, series: str) -> str:
        if (suite, series) in had:
            return "measured there at other lengths or under other conditions"
        return "measured there with other methods or parameters" if suite in suites else "not measured there"

    return Counter((one.suite, why(one.suite, of(one)[1])) for one in found if of(one)[0] == ABSENT)


def _lone(a: pd.DataFrame, b: pd.DataFrame, column: str) -> bool:
    return a[column].nunique() == 1 and b[column].nunique() == 1


def methods(table: pd.DataFrame, a: str, b: str) -> list[Comparison]:
    """Two methods (`method` or `method@implementation`, as the suite asked for them) of one table, under equal conditions.

    Every parameter set of one meets every parameter set of the other. Raises `UserError` for a label that the table lacks.
    """
    known = set(table["label"]) if not table.empty else set()
    for label in (a, b):
        if label not in known:
            raise unknown("method", label, known, "these results")
    table = frame.current(table)
    sides = [table[table["label"] == label] for label in (a, b)]
    keys = ["suite", "device", "task", "mode", "n", *CONDITIONS]
    again, names = _again(table), series.labels(table)
    parts = [
        [(frame.is_causal(str(params)), _Side(rows, names, again, str(names[rows.index[0]]))) for params, rows in side.groupby("params")]
        for side in sides
    ]
    pairs = list(itertools.product(*parts))
    alike = [pair for pair in pairs if pair[0][0] == pair[1][0]] or pairs  # a causal mask is a condition, not a setting of the method
    return [row for (_, left), (_, right) in alike for row in _paired(left, right, keys)]


def fastest(rows: Sequence[dict[str, Any]], again: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """The measured row than which every other is slower; None where one is not separable from it, or where there is no other.

    `again` are A/A pairs of times. Rows of one method, implementation and parameters are one contestant.
    """
    ranked = sorted((r for r in rows if frame.timed(r)), key=lambda r: float(r["time_s"]))
    others = [r for r in ranked[1:] if any(r[k] != ranked[0][k] for k in ("method", "implementation", "params"))]
    noise = stats.floor(again, float(ranked[0]["time_s"])) if ranked else None
    slower = (stats.verdict(stats.ratio(ranked[0]["samples_s"], r["samples_s"]), noise) is Verdict.SLOWER for r in others)
    return ranked[0] if others and all(slower) else None


class _Side:
    """One side's first measurements, A/A pairs of their table by suite, device and mode, and the series' name where it is one series."""

    def __init__(
        self, rows: pd.DataFrame, names: pd.Series[str], again: dict[tuple[str, str, str], list[tuple[float, float]]], name: str = ""
    ) -> None:
        self.rows = rows[rows["replicate"] == 0].assign(series=names)
        self.again = again
        self.name = name

    def by(self, keys: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
        """The rows by the values of `keys`."""
        rows = ({str(k): v for k, v in row.items()} for row in self.rows.to_dict("records"))
        return {tuple(row[key] for key in keys): row for row in rows}


def _again(table: pd.DataFrame) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """(suite, device, mode) -> A/A pairs of times."""
    return {(str(s), str(d), str(m)): series.pairs(rows, str(m)) for (s, d, m), rows in table.groupby(["suite", "device", "mode"])}


def _paired(a: _Side, b: _Side, keys: Sequence[str]) -> list[Comparison]:
    """Pair the rows that agree in `keys`."""
    left, right = a.by(keys), b.by(keys)
    order = sorted({*left, *right}, key=lambda cell: tuple(map(_sortable, cell)))
    return [_compare(left.get(cell), right.get(cell), a, b) for cell in order]


def _sortable(value: Any) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value))


def _compare(a: dict[str, Any] | None, b: dict[str, Any] | None, side_a: _Side, side_b: _Side) -> Comparison:
    some = a or b
    assert some is not None, "a cell comes from one side at least"
    sides = [(a, side_a), (b, side_b)]
    measured = [(row, side) for row, side in sides if row and frame.timed(row)]
    near = min((float(row["time_s"]) for row, _ in measured), default=None)
    noise = [f for row, side in measured if (f := stats.floor(side.again.get((row["suite"], row["device"], row["mode"]), ()), near))]
    floor = max(noise, key=lambda f: f.relative) if len(measured) == 2 and noise else None
    ratio = stats.ratio(*(row["samples_s"] for row, _ in measured)) if len(measured) == 2 else None
    time_a, time_b = (float(row["time_s"]) if row and frame.timed(row) else None for row, _ in sides)
    fates = [ABSENT if row is None else UNTIMED if row["status"] == "ok" and not frame.timed(row) else str(row["status"]) for row in (a, b)]
    return Comparison(
        suite=" / ".join(dict.fromkeys(str(row["suite"]) for row, _ in sides if row)),
        device=" / ".join(dict.fromkeys(str(row["device"]) for row, _ in sides if row)),
        series_a=str(a["series"]) if a else side_a.name or str(some["series"]),
        series_b=str(b["series"]) if b else side_b.name or str(some["series"]),
        mode=str(some["mode"]),
        n=int(some["n"]),
        profile=str(some["profile"]),
        conditions=series.conditions(some),
        status_a=fates[0],
        status_b=fates[1],
        time_a_s=time_a,
        time_b_s=time_b,
        ratio=ratio,
        floor=floor,
        verdict=stats.verdict(ratio, floor) if ratio else None,
    )
