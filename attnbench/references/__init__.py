"""Numbers measured elsewhere: cited beside ours in figures and reports, never compared as if they were ours.

A `.toml` file here holds one source: `label`, `method`, `device` (how the name of the device begins), `source` (whose numbers, of which
version, measured how), `[conditions]` that a picture must have for them to be drawn in it, and `[[series]]` with further conditions,
`params`, lengths `n` and, for each length, any of `forward_ms`, `forward_backward_ms` and `peak_memory_mib`.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TIME, MEMORY = "time_s", "peak_bytes"
"""Columns of a results table that can be cited."""

_BOTH = "forward+backward"
_VALUES = {"forward_ms": ("forward", TIME, 1e-3), "forward_backward_ms": (_BOTH, TIME, 1e-3), "peak_memory_mib": (_BOTH, MEMORY, 2**20)}
"""Key of a series -> mode, column, base units in one of its."""
_CONDITIONS = ("batch", "heads", "dim", "dtype")


@dataclass(frozen=True)
class Cited:
    """One line of numbers: a method under one setting, in one mode."""

    label: str
    """whose"""
    method: str
    params: Mapping[str, Any]
    mode: str
    column: str
    values: Mapping[int, float]
    """length -> value in base units"""
    source: str
    device: str
    """how the device's name begins"""
    conditions: Mapping[str, Any]

    def name(self, *, settings: bool) -> str:
        """Whose they are, with the parameters or without."""
        by_value: dict[str, list[str]] = {}
        for key, value in self.params.items() if settings else ():
            by_value.setdefault(str(value), []).append(key)
        return ", ".join([self.label, *("=".join([*keys, value]) for value, keys in by_value.items())])

    def same_setting(self, rows: pd.DataFrame) -> pd.Series[bool]:
        """Which rows are ours of the same method, mode and parameters, whatever the implementation."""
        alike = [self.params.items() <= json.loads(params).items() for params in rows["params"]]
        ours = (rows["method"] == self.method) & (rows["mode"] == self.mode) & (rows["replicate"] == 0)
        return ours & pd.Series(alike, rows.index, dtype=bool)


@cache
def load() -> tuple[Cited, ...]:
    """All numbers that are cited. Raises `UserError` for a file that is not as the package says."""
    paths = sorted((p for p in files(__name__).iterdir() if p.name.endswith(".toml")), key=lambda p: p.name)
    return tuple(one for path in paths for one in read(path.read_text(encoding="utf-8"), path.name))


def read(text: str, name: str) -> Iterator[Cited]:
    """The numbers of one file. Raises `UserError`."""
    data = tomllib.loads(text)
    _checked(data, ("label", "method", "device", "source", "conditions", "series"), name)
    for series in data["series"]:
        conditions = {**data["conditions"], **{k: v for k, v in series.items() if k in _CONDITIONS}}
        _checked(conditions, _CONDITIONS, name)
        _checked({k: v for k, v in series.items() if k not in _CONDITIONS}, ("n", "params"), name, optional=tuple(_VALUES))
        for key, (mode, column, unit) in _VALUES.items():
            if key in series:
                if len(series[key]) != len(series["n"]):
                    raise UserError(f"{name}: {key} has {len(series[key])} values for {len(series['n'])} lengths")
                values = {n: value * unit for n, value in zip(series["n"], series[key], strict=True)}
                own = (data["label"], data["method"], series["params"], mode, column, values)
                yield Cited(*own, source=data["source"], device=data["device"], conditions=conditions)


def _checked(data: Mapping[str, Any], needed: tuple[str, ...], name: str, optional: tuple[str, ...] = ()) -> None:
    for key in data:
        if key not in (*needed, *optional):
            raise unknown("key", key, (*needed, *optional), name)
    for key in needed:
        if key not in data:
            raise UserError(f"{name} lacks {key!r}")


def beside(rows: pd.DataFrame, column: str) -> list[Cited]:
    """Numbers of `column` that belong beside these rows of one device and one set of conditions: the same device, conditions and settings.

    A captured CUDA graph leaves out what the cited numbers hold, so nothing is cited beside one.
    """
    if rows.empty or rows["graph"].any():
        return []
    first, speed = rows.iloc[0], rows[rows["task"] == "speed"]
    return [
        one
        for one in load()
        if one.column == column
        and str(first["device"]).startswith(one.device)
        and all(first[key] == value for key, value in one.conditions.items())
        and one.same_setting(speed).any()
    ]
