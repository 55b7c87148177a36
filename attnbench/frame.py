"""Records as one table: a row for the latest attempt at each cell, one column a fact, nothing derived."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import store
from attnbench.environment import flat
from attnbench.errors import UserError
from attnbench.stats import median

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from attnbench.record import Record


def load(results: Path, *, attempts: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """The table of all records below `results`, and notes about repaired files. Raises `UserError`.

    A row is the latest attempt at a cell in an environment, or with `attempts` every attempt. What only some attempts ask for, the
    breakdown and the energy, is that of the last one that has it and ran the same implementation.

    Columns: `suite`, `device`, `label` (`method@implementation` as asked), `method`, `implementation` (what ran), the fields of
    the case, `params` (JSON), `budget` (tuple) and `learned` as recorded, `status`, `reason`, `started`, `samples_s` (tuple), `time_s`
    (median), memory in `*_bytes`, `flops`, `bytes`, one column a task metric, `breakdown` and `training` as recorded where there are any,
    `energy_j` of a call above `idle_w` and power `mean_w` where they were metered, `apart_s` and `metered_s` (median time of a call in the
    attempt that was taken apart, or metered), and the environment's `facts` (tuple of pairs: `environment.flat`) and, where measured,
    `copy_bytes_per_s` and `matmul_flops_per_s`.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for file in store.find(results):
        loaded = store.read(file)
        notes += loaded.notes
        known, extras = store.environments(file), {} if attempts else _asked(loaded.records)
        rows += [
            {**extras.get(_same(r), {}), **_row(r, file.parent.parent.name, known.get(r.env_id, {}))}
            for r in (loaded.records if attempts else store.latest(loaded.records))
        ]
    return pd.DataFrame(rows), notes


def _same(record: Record) -> tuple[str, ...]:
    return (record.case.case_id, record.env_id, record.implementation, str(record.status))


def _asked(records: Iterable[Record]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What attempts were asked for beyond times, by what must be the same, each from the last that has it."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        found.setdefault(_same(record), {}).update(_extra(record))
    return found


def current(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: where a cell ran in several environments of one device, the newest `ok`, else the newest attempt."""
    ranked = table.assign(_ok=table["status"] == "ok").sort_values(["_ok", "started"], kind="stable")
    return ranked.drop_duplicates(["suite", "device", "case_id"], keep="last").sort_index().drop(columns="_ok")


def only(table: pd.DataFrame, suites: Sequence[str] = (), methods: Sequence[str] = (), devices: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of these suites, methods and devices; of all where none are named.

    A method is `name`, or `name@implementation` as asked for or as it ran; a device is named as records or as file names do. Raises
    `UserError` where a name, or all of them together, leave nothing.
    """
    asked: list[pd.Series[bool]] = []
    for option, column, names in (("suite", "suite", suites), ("method", "method", methods), ("device", "device", devices)):
        if not names or table.empty:
            continue
        found = [_named(table, option, name) for name in names]
        for name, rows in zip(names, found, strict=True):
            if not rows.any():
                known = table[table["method"] == name.partition("@")[0]] if option == "method" and "@" in name else table[:0]
                there = [f"{m}@{i}" for m, i in zip(known["method"], known["implementation"], strict=True) if i] or table[column].tolist()
                raise UserError(f"--{option} {name}: these results have {', '.join(sorted({v or 'unknown device' for v in there}))}")
        asked.append(pd.concat(found, axis=1).any(axis=1))
    kept = table[pd.concat(asked, axis=1).all(axis=1)] if asked else table
    if asked and kept.empty:
        left = table[asked[0]]
        there = [f"{v} on {d or 'unknown device'}" for v, d in sorted(set(zip(left["suite"], left["device"], strict=True)))]
        raise UserError(f"no record has all that the filters ask for: the first of them leaves {', '.join(there)}")
    return kept


def _named(table: pd.DataFrame, option: str, name: str) -> pd.Series[bool]:
    if option == "method" and "@" in name:
        return (table["label"] == name) | (table["method"] + "@" + table["implementation"].fillna("") == name)
    if option == "device":
        slug = store.device_slug(name)
        return table["device"].map(lambda d: store.device_slug(str(d) or "unknown device") == slug)
    return table[option] == name


def is_causal(params: str) -> bool:
    """Whether parameters (JSON) ask for a causal form."""
    return bool(json.loads(params).get("causal", False))


def timed(row: Mapping[str, Any]) -> bool:
    """Whether a row of the table was measured with a clock; cells that ran beside others were not."""
    return bool(row["status"] == "ok" and row["time_s"] == row["time_s"])


def _row(record: Record, suite: str, environment: dict[str, Any]) -> dict[str, Any]:
    case = record.case.as_dict()
    ceilings = environment.get("ceilings", {})
    row = {
        **case,
        "suite": suite,
        "device": environment.get("device", ""),
        "case_id": record.case.case_id,
        "env_id": record.env_id,
        "facts": tuple(flat(environment).items()),
        "label": record.case.label,
        "asked": record.case.implementation,
        "implementation": record.implementation,
        "params": json.dumps(case["params"], sort_keys=True),
        "status": str(record.status),
        "reason": "; ".join(record.reasons),
        "flops": record.flops,
        "bytes": record.bytes,
        "started": record.started,
        "command": record.command,
        "commit": record.commit,
        "budget": record.budget,
        "learned": record.learned,
        "operator": record.gate.operator if record.gate else "",
        "copy_bytes_per_s": ceilings.get("copy_bytes_per_s"),
        "matmul_flops_per_s": ceilings.get(f"matmul_{case['dtype']}_flops_per_s"),
        **record.metrics,
        "time_s": float("nan"),
    }
    if record.timing:
        row |= {
            "samples_s": record.timing.samples_s,
            "time_s": median(record.timing.samples_s),
            "first_call_s": record.timing.first_call_s,
            "throttled": record.timing.throttled,
            "clock": record.timing.clock,
        }
    row |= _extra(record)
    if record.training:
        row["training"] = record.training
    if record.memory:
        row |= {k: v for k, v in vars(record.memory).items() if k.endswith("_bytes")}
    return row


def _extra(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {}
    time_s = median(record.timing.samples_s) if record.timing else float("nan")
    if record.breakdown:
        row |= {"breakdown": record.breakdown, "apart_s": time_s}
    if record.energy:
        parts = record.energy
        row |= {"energy_j": parts.joules_per_call, "idle_w": parts.idle_w, "mean_w": parts.mean_w, "metered_s": time_s}
    return row
