"""How rows become lines: which rows belong together, what a line is called, and under which conditions it was measured."""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from attnbench import registry, stats
from attnbench.axes import CHOICES
from attnbench.inputs import PROFILES
from attnbench.store import device_slug
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from attnbench.method import Method

CONDITIONS = ("batch", "heads", "kv_heads", "dim", "dim_v", "dtype", "l2", "graph", "profile", "seed")
"""Columns that must be equal within one picture, beside suite, device and task."""

INPUTS = ("profile", "seed")
"""Conditions that the tasks fidelity and health vary within one picture."""

_VARIED = {"fidelity": INPUTS, "health": INPUTS, "accuracy": ("batch", "seed")}
"""Task -> conditions that vary within one picture of it."""

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
        keys = [c for c in CONDITIONS if c not in _VARIED.get(str(task), ())]
        vary = [c for c in keys if rows[c].nunique() > 1]
        for values, part in rows.groupby(vary, sort=True) if vary else [((), rows)]:
            extra = [device_slug(f"{SHORT.get(c, c)}{v}") for c, v in zip(vary, values, strict=True)]
            yield Group(str(suite), "-".join([device_slug(str(device)) or "unknown-device", *extra]), part)


def one_device(table: pd.DataFrame) -> None:
    """Raise `ValueError` where a table holds rows of several devices: what was measured on one says nothing of another."""
    if "device" in table and table["device"].nunique() > 1:
        raise ValueError("the table mixes devices: split it with attnbench.series.groups, or the figure's own groups, first")


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
    return pd.Series([names[pair] for pair in zip(table["label"], table["params"], strict=True)], index=table.index, dtype="str")


def _label(label: str, params: dict[str, Any], siblings: list[dict[str, Any]]) -> str:
    name, _, implementation = label.partition("@")
    method = method_of(name)
    title = (method.title if method else name) + (f" ({implementation})" if implementation else "")
    differing = [key for key in params if any(other.get(key) != params[key] for other in siblings)]
    by_value: dict[str, list[str]] = {}
    for key in differing:  # numbers that are equal are named once; switches that are both on have nothing in common
        value = str(params[key])
        by_value.setdefault(f"{key}={value}" if isinstance(params[key], bool) else value, []).append(key)
    return ", ".join([title, *("=".join([*keys, str(params[keys[0]])]) for keys in by_value.values())])


def settings(rows: pd.DataFrame) -> str:
    """Parameters that the labels of these rows leave out, as a sentence: numbers always, others where not at their default."""
    parts: dict[str, str] = {}
    for label, group in rows.groupby("label", sort=True):
        sets = [json.loads(p) for p in group["params"].unique()]
        method = method_of(str(label).partition("@")[0])
        default = method.params().as_dict() if method else {}
        alike = {k: v for k, v in sets[0].items() if all(s.get(k) == v for s in sets)}
        told = {
            k: v for k, v in alike.items() if (isinstance(v, int | float) and not isinstance(v, bool)) or (k in default and v != default[k])
        }
        if told:
            parts[method.title if method else str(label)] = ", ".join(f"{k}={v}" for k, v in told.items())
    return "; ".join(f"{title}: {text}" for title, text in parts.items()) + ". " if parts else ""


def natural(text: str) -> list[tuple[str, int]]:
    """Sort key that reads the numbers in a text as numbers."""
    return [(word, int(number or -1)) for word, number in re.findall(r"(\D*)(\d*)", text)]


def family_rank(family: object) -> int:
    """Place of a family in the taxonomy's order, unknown ones last."""
    order = [str(f) for f in Family]
    return order.index(str(family)) if str(family) in order else len(order)


def panel_order(panels: Iterable[str]) -> list[str]:
    """Modes and input profiles in the order in which the suite knows them, then others by name."""
    known = [*CHOICES["mode"], *PROFILES]
    return sorted(panels, key=lambda p: (known.index(p) if p in known else len(known), natural(p)))


FILE = "file:"
"""What an input profile begins with whose tensors were captured to a file."""


def profile_titles(profiles: Iterable[str]) -> dict[str, str]:
    """Input profile -> what figures and tables call it.

    `file:FOLDER/3-NAME.safetensors`, as `attnbench capture` names them, is `layer 3`, unless these are layers of several models.
    """
    known = sorted(set(profiles))
    titles = {profile: _layer(profile) for profile in known}
    return titles if len(set(titles.values())) == len(known) else {profile: profile for profile in known}


def _layer(profile: str) -> str:
    if not profile.startswith(FILE):
        return profile
    stem = PurePath(profile.removeprefix(FILE)).stem
    match = re.match(r"(\d+)-", stem)
    return f"layer {int(match[1])}" if match else stem


def captured(profiles: Iterable[str]) -> str:
    """Where the layers among input profiles come from, in a sentence; empty where there are none."""
    folders = sorted({str(PurePath(p.removeprefix(FILE)).parent) for p in profiles if p.startswith(FILE)})
    return f"Layers: inputs that `attnbench capture` wrote to {', '.join(folders)}." if folders else ""


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
        parts.append(_environments(rows))
    return ", ".join(parts)


def _environments(rows: pd.DataFrame) -> str:
    """How many environments rows come from, and which facts are not the same in all of them."""
    known = rows.drop_duplicates("env_id")
    facts = [dict(each) for each in known["facts"] if each]
    names = sorted(set().union(*facts))
    differ = [name for name in names if len({str(each.get(name)) for each in facts}) > 1]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return f"{len(known)} environments" + (f" (different {'/'.join(differ[:3])}{more})" if differ else "")


def conditions(row: Mapping[str, Any] | pd.Series[Any]) -> str:
    """Conditions of one row as `B=1, H=16, ...`, without head counts and widths that are those of the queries."""
    told = (c for c in CONDITIONS if c not in ("kv_heads", "dim_v") or row[c])
    return ", ".join(f"{SHORT.get(c, c)}={row[c]}" for c in told)


def earlier(rows: pd.DataFrame, time: str, what: str) -> str:
    """How many rows come from an attempt before the last, in a sentence that begins with `what` was done; empty where none does.

    `time` is the column with the median time of a call in that attempt, as in `attnbench.frame.load`.
    """
    known = rows[rows[time].notna() & rows["time_s"].notna()]
    old = int((known[time] != known["time_s"]).sum())
    return f"{what} in an earlier attempt than the last: {old} of {len(known)} cells." if old else ""


def _listed(values: list[Any]) -> str:
    return "/".join(str(v) for v in values)


def noise(table: pd.DataFrame) -> str:
    """The noise floor of the table's A/A pairs in words, from the quietest duration to the noisiest; empty without pairs."""
    known = [pairs(table, mode) for mode in table["mode"].unique()] if len(table) else []
    floors = sorted(f.relative for alike in known for a, b in alike if (f := stats.floor(alike, math.sqrt(a * b))))
    if not floors:
        return ""
    low, high = f"{floors[0]:.1%}", f"{floors[-1]:.1%}"
    count = f"{len(floors)} A/A {'pair' if len(floors) == 1 else 'pairs'}"
    return f"{low} over {count}" if low == high else f"{low} to {high} by duration, over {count}"


def pairs(table: pd.DataFrame, mode: str) -> list[tuple[float, float]]:
    """Median times `(first, again)` of every A/A pair of a mode, in seconds; a pair ran the same code in one environment.

    Modes are apart, since a host takes several times as long to launch a backward pass as a forward pass, and errs as much more.
    """
    if table.empty:
        return []
    table = table[table["mode"] == mode]
    keys = ["suite", "device", "env_id", "commit", "implementation", "label", "params", "task", "mode", "n", *CONDITIONS]
    measured = table[table["time_s"].notna()]
    again = measured[measured["replicate"] > 0]
    first = measured[measured["replicate"] == 0]
    joined = first[[*keys, "time_s"]].merge(again[[*keys, "time_s"]], on=keys, suffixes=("_first", "_again"))
    return list(zip(joined["time_s_first"].tolist(), joined["time_s_again"].tolist(), strict=True))
