"""Every number that a figure or a table may show: its unit, its scale, which way is better, and how it is derived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Metric:
    """One quantity of a row of `attnbench.frame.load`."""

    name: str
    column: str
    """where `add` leaves it"""
    label: str
    """as an axis prints it, without the unit"""
    unit: str
    """as an axis prints it; empty for pure numbers"""
    better: Literal["lower", "higher"]
    scale: Literal["log", "linear"] = "log"
    needs: tuple[str, ...] = ()
    """columns it is derived from, beside the time; empty for a stored or a bare time"""
    of_time: Callable[[pd.DataFrame, pd.Series[float]], pd.Series[float]] | None = None
    """value from the row and a time in seconds, so that quartiles of the time give quartiles of it; None where not of time"""
    of_row: Callable[[pd.DataFrame], pd.Series[float]] | None = None
    """value from the row alone, where it is derived but not of time"""
    divide: float = 1.0
    """base units in one `unit`, for axes"""
    least: float = 0.0
    """where a logarithmic axis ends whatever is below, in base units"""

    @property
    def axis(self) -> str:
        """`label (unit)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def at(self, table: pd.DataFrame, time: pd.Series[float]) -> pd.Series[float]:
        """The metric of each row, in base units, were its time `time`; NaN where a needed column is absent or unknown."""
        if any(name not in table for name in self.needs):
            return pd.Series(np.nan, index=table.index)
        if self.of_time is not None:
            return self.of_time(table, time)
        return self.of_row(table) if self.of_row else _numbers(table, self.column)


def _numbers(table: pd.DataFrame, column: str) -> pd.Series[float]:
    if column not in table:
        return pd.Series(np.nan, index=table.index)
    return pd.to_numeric(table[column], errors="coerce").astype(float)


def _floor(table: pd.DataFrame) -> pd.Series[float]:
    """Roofline floor in seconds: `max(flops / measured matmul rate, bytes / measured copy bandwidth)`."""
    compute = _numbers(table, "flops") / _numbers(table, "matmul_flops_per_s")
    traffic = _numbers(table, "bytes") / _numbers(table, "copy_bytes_per_s")
    return pd.Series(np.maximum(compute, traffic), index=table.index)  # NaN where either side is unknown


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("latency", "time_s", "time per call", "ms", "lower", of_time=lambda _, time: time, divide=1e-3),
        Metric(
            "throughput",
            "tokens_per_s",
            "throughput",
            "million tokens/s",
            "higher",
            needs=("batch", "n"),
            of_time=lambda t, time: _numbers(t, "batch") * _numbers(t, "n") / time,
            divide=1e6,
        ),
        Metric(
            "tflops",
            "achieved_flops_per_s",
            "achieved rate",
            "TFLOP/s",
            "higher",
            needs=("flops",),
            of_time=lambda t, time: _numbers(t, "flops") / time,
            divide=1e12,
        ),
        Metric(
            "efficiency",
            "efficiency",
            "roofline floor / time",
            "",
            "higher",
            needs=("flops", "bytes", "matmul_flops_per_s", "copy_bytes_per_s"),
            of_time=lambda t, time: _floor(t) / time,
        ),
        Metric("peak_memory", "peak_bytes", "peak memory beside inputs", "MiB", "lower", divide=2**20),
        Metric("workspace", "workspace_bytes", "workspace memory", "MiB", "lower", divide=2**20),
        Metric(
            "energy",
            "joules_per_token",
            "energy above idle",
            "mJ/token",
            "lower",
            needs=("energy_j", "batch", "n"),
            of_row=lambda t: _numbers(t, "energy_j") / (_numbers(t, "batch") * _numbers(t, "n")),
            divide=1e-3,
        ),
        Metric("rel_error", "rel_error", "relative error against softmax", "", "lower"),
        Metric("cosine", "cosine", "cosine with softmax", "", "higher", "linear"),
        Metric("mass_recalled", "mass_recalled", "softmax mass recalled", "", "higher", "linear"),
        Metric("load_entropy", "load_entropy", "entropy of expert load / log E", "", "higher", "linear"),
        Metric("max_load", "max_load", "load share of the busiest expert", "", "lower"),
        Metric("pruned", "pruned", "tokens that no routed expert keeps", "", "lower", "linear"),
        Metric("duplicates", "duplicates", "places in experts that repeat a token", "", "lower", "linear"),
        Metric("accuracy", "accuracy", "test accuracy", "", "higher", "linear"),
        Metric("accuracy_before", "accuracy_before", "test accuracy with the method trained with", "", "higher", "linear"),
        Metric("train_tokens_per_s", "train_tokens_per_s", "training throughput", "thousand tokens/s", "higher", divide=1e3),
        Metric("top1_agreement", "top1_agreement", "top-1 agreement with softmax", "", "higher", "linear"),
    )
}
"""Metric by name."""


def add(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a column for every metric, NaN where a row has nothing for it, and `floor_s`, the roofline floor."""
    time = _numbers(table, "time_s")
    derived = {m.column: m.at(table, time) for m in METRICS.values()}
    return table.assign(floor_s=_floor(table), **derived)


def better(metric: str, a: float, b: float) -> bool:
    """Whether `a` is strictly better than `b`."""
    return a < b if METRICS[metric].better == "lower" else a > b
