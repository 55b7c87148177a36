"""How rows become lines: which rows belong together, what a line is called, and under which conditions it was measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from attnbench import registry, stats
from attnbench.store import device_slug

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from attnbench.method import Method
    from attnbench.taxonomy import Family

CONDITIONS = ("batch", "heads", "kv_heads", "dim", "dim_v", "dtype", "l2", "graph", "profile", "seed")
"""Columns that must be equal within one picture, beside suite, device and task."""

INPUTS = ("profile", "seed")
"""Conditions that the fidelity task varies within one picture."""

SHORT = {"batch": "B", "heads": "H", "kv_heads": "Hkv", "dim": "D", "dim_v": "Dv"}
"""Condition -> its axis letter."""


class Group(NamedTuple):
    """Rows measured under the same conditions on one device."""

    suite: str
    place: str
    """the device, and the conditions that tell this group from the suite's others, as part of a file name"""
    rows: pd.DataFrame


def groups(table: pd.DataFrame) -> Iterator[Group]:
    """Split a table by device, suite, task and conditions: nothing is ever pooled over these."""
    for (suite, device, task), rows in table.groupby(["suite", "device", "task"], sort=True):
        keys = [c for c in CONDITIONS if not (task == "fidelity" and c in INPUTS)]
        vary = [c for c in keys if rows[c].nunique() > 1]
        for values, part in rows.groupby(vary, sort=True) if vary else [((), rows)]:
            extra = [device_slug(f"{SHORT.get(c, c)}{v}") for c, v in zip(vary, values, strict=True)]
            yield Group(str(suite), "-".join([device_slug(str(device)) or "unknown-device", *extra]), part)


def method_of(name: str) -> Method | None:
    """The method called `name`; None where the registry lacks it, as for records of a plugin that is not loaded."""
    return registry.registry().found.get(name)


def family(name: str) -> Family | None:
    """Family of the method called `name`, where it is known."""
    method = method_of(name)
    return method.family if method else None


def exact(name: str) -> bool:
    """Whether the method called `name` computes softmax attention itself."""
    method = method_of(name)
    return method is not None and method.exact


def labels(table: pd.DataFrame) -> pd.Series[str]:
    """A printed name for each row: title, the implementation where one was asked for, and the parameters that differ.

    Only parameters in which the table's rows of the same method and implementation differ are named.
    """
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}
    pairs = table[["label", "params"]].drop_duplicates()
    for label, params in zip(pairs["label"], pairs["params"], strict=True):
        known.setdefault(label, []).append(json.loads(params))
    names = {(label, p): _label(label, json.loads(p), known[label]) for label, p in zip(pairs["label"], pairs["params"], strict=True)}
    return table.apply(lambda row: names[row["label"], row["params"]], axis=1).astype(str)


def _label(label: str, params: dict[str, Any], siblings: list[dict[str, Any]]) -> str:
    name, _, implementation = label.partition("@")
    method = method_of(name)
    title = (method.title if method else name) + (f" ({implementation})" if implementation else "")
    differing = [key for key in params if any(other.get(key) != params[key] for other in siblings)]
    by_value: dict[str, list[str]] = {}
    for key in differing:
        by_value.setdefault(str(params[key]), []).append(key)
    return ", ".join([title, *("=".join([*keys, value]) for value, keys in by_value.items())])


def describe(rows: pd.DataFrame) -> str:
    """Conditions of a group in words; a condition with several values lists them."""
    known = {c: sorted(rows[c].dropna().unique().tolist()) for c in CONDITIONS}
    parts = [", ".join(sorted(str(d) or "unknown device" for d in rows["device"].unique()))]
    parts += [f"{letter}={_listed(known[c])}" for c, letter in SHORT.items() if c not in ("kv_heads", "dim_v") or any(known[c])]
    parts.append(_listed(known["dtype"]))
    if known["profile"] and set(rows["task"]) == {"speed"}:
        parts.append(f"{_listed(known['profile'])} inputs")
    if "clock" in rows and rows["clock"].astype(str).str.startswith("cuda").any():
        parts.append(f"L2 {_listed(known['l2'])}")
    if any(known["graph"]):
        parts.append("CUDA graph" if all(known["graph"]) else "with and without CUDA graph")
    if rows["env_id"].nunique() > 1:
        parts.append(f"{rows['env_id'].nunique()} environments")
    return ", ".join(parts)


def _listed(values: list[Any]) -> str:
    return "/".join(str(v) for v in values)


def noise(table: pd.DataFrame) -> stats.Floor | None:
    """Noise floor of the table's A/A pairs: rows with `replicate` above 0 against the same cell with 0, both `ok`."""
    return stats.floor(pairs(table))


def pairs(table: pd.DataFrame) -> list[tuple[float, float]]:
    """Median times `(first, again)` of every A/A pair, in seconds; a pair lies within one environment."""
    if "time_s" not in table:
        return []
    keys = ["suite", "env_id", "label", "params", "task", "mode", "n", *CONDITIONS]
    measured = table[table["status"] == "ok"]
    again = measured[measured["replicate"] > 0]
    first = measured[measured["replicate"] == 0]
    joined = first[[*keys, "time_s"]].merge(again[[*keys, "time_s"]], on=keys, suffixes=("_first", "_again"))
    return list(zip(joined["time_s_first"].tolist(), joined["time_s_again"].tolist(), strict=True))
