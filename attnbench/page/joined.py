"""One row a cell: its time beside its memory, its fidelity, its method's place in the taxonomy, and the command that makes it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnbench import frame, joining, metrics, series, stats, typeset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the page's table."""

    title: str
    of: Callable[[Row], object]
    """value of a row; None or NaN where it has none"""
    numeric: bool = True
    help: str = ""

    def text(self, row: Row) -> str:
        """As printed: numbers to 3 significant figures."""
        value = self.of(row)
        if value is None or value != value or value == "":  # noqa: PLR0124 (NaN)
            return typeset.NONE
        return _short(float(value)) if isinstance(value, float) else str(value)

    def key(self, row: Row) -> str:
        """What the page sorts numbers by; empty where there is none."""
        value = self.of(row)
        return "" if not isinstance(value, int | float) or value != value else f"{value:.6g}"  # noqa: PLR0124 (NaN)


def _short(value: float) -> str:
    return f"{value:.2e}" if value and abs(value) < 1e-3 else typeset.figures(value)


def _per(column: str, unit: float) -> Callable[[Row], object]:
    def of(row: Row) -> float | None:
        value = row.get(column)
        return None if value is None else float(value) / unit

    return of


def _spread(row: Row) -> float | None:
    if row["status"] != "ok" or not isinstance(row.get("samples_s"), tuple):
        return None
    low, _, high = stats.quartiles(row["samples_s"])
    return (high - low) * 1e3


COLUMNS = (
    Column("method", lambda r: r["series"], numeric=False, help="with the implementation asked for and the parameters that differ"),
    Column("ran", lambda r: r["implementation"], numeric=False, help="the implementation that ran"),
    Column("suite", lambda r: r["suite"], numeric=False),
    Column("device", lambda r: r["device"], numeric=False),
    Column("inputs", lambda r: f"{r['profile']}, {r['dtype']}, seed {r['seed']}", numeric=False),
    Column("mode", lambda r: r["mode"] + (f", repeat {r['replicate']}" if r["replicate"] else ""), numeric=False),
    Column("N", lambda r: int(r["n"])),
    Column("B x H x D", lambda r: f"{r['batch']} x {r['heads']} x {r['dim']}", numeric=False, help="batch, heads, dimension of a head"),
    Column("status", lambda r: r["status"], numeric=False),
    Column("time (ms)", _per("time_s", 1e-3), help="median time per call"),
    Column("IQR (ms)", _spread, help="interquartile range of the samples"),
    Column("speed-up", lambda r: r["speed_up"], help="over the fastest exact method under the same conditions at this length"),
    Column("million tokens/s", _per("tokens_per_s", 1e6)),
    Column("floor / time", _per("efficiency", 1), help="share of the roofline floor"),
    Column("peak (MiB)", _per("peak_bytes", 2**20), help="peak memory beside inputs"),
    Column(
        "error",
        lambda r: r["error"],
        help="relative error against softmax attention: this cell's, else the median of the fidelity "
        "cells of the same method and parameters on this device at the nearest length",
    ),
    Column("error at N", lambda r: r["error_n"], help="length at which that error was measured"),
    Column("accuracy", _per("accuracy", 1), help="on the test split, of a model trained with this method"),
    Column("energy (uJ/token)", _per("joules_per_token", 1e-6), help="above idle"),
)
"""The table, from left to right."""


def rows(table: pd.DataFrame) -> list[Row]:
    """One a cell, failures included, in the taxonomy's order, then by length."""
    current = metrics.add(frame.current(table))
    errors = joining.errors(current)
    found = [row for group in series.groups(current) for row in _group(group, errors)]
    return sorted(found, key=lambda r: (series.family_rank(series.family(r["method"])), series.natural(r["series"]), r["suite"], r["n"]))


def _group(group: series.Group, errors: dict[tuple[str, str, str], dict[int, float]]) -> Iterator[Row]:
    named = group.rows.assign(series=series.labels(group.rows))
    records = [{str(k): v for k, v in row.items()} for row in named.to_dict("records")]
    fastest: dict[tuple[Any, ...], float] = {}
    for row in records:
        if row["status"] == "ok" and series.exact(row["method"]) and row["time_s"] == row["time_s"]:
            fastest[_point(row)] = min(row["time_s"], fastest.get(_point(row), row["time_s"]))
    for row in records:
        base = fastest.get(_point(row)) if row["status"] == "ok" else None
        error, at = _error(row, errors.get((row["device"], row["method"], row["params"]), {}))
        yield {**row, "speed_up": base / row["time_s"] if base else None, "error": error, "error_n": at}


def _point(row: Row) -> tuple[Any, ...]:
    return (row["mode"], row["n"], row["profile"], row["seed"])


def _error(row: Row, known: dict[int, float]) -> tuple[float | None, int | None]:
    if row["task"] == "fidelity":
        own = row.get("rel_error")
        return (None, None) if own is None or own != own else (float(own), int(row["n"]))  # noqa: PLR0124 (NaN)
    return joining.nearest(known, int(row["n"]))
