"""`attnbench plan`."""

from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli._options import (
    Axes,
    Budget,
    Data,
    Json,
    MethodNames,
    Plugins,
    Settings,
    SuiteName,
    note_unused,
    read_suite,
    with_folder,
    with_plugins,
)
from attnbench.cli._output import emit_json, emit_table, si

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from attnbench.case import Case
    from attnbench.plan import Ceilings, Prediction, Total

_TERA = 1e12


def plan(
    suite: SuiteName,
    method: MethodNames = [],
    axis: Axes = [],
    set_: Settings = [],
    budget: Budget = None,
    data: Data = None,
    flops: Annotated[float | None, typer.Option("--flops", metavar="TFLOP/S", help="Rate of matrix products. Default: an H100's.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", metavar="TB/S", help="Memory bandwidth. Default: an H100's.")] = None,
    json: Json = False,
    plugin: Plugins = [],
) -> None:
    """Say what a suite would run, and its least time, work and memory, by the methods' cost models. Runs nothing, needs no GPU."""
    from attnbench import plan as planning

    with_plugins(plugin)
    chosen = with_folder(read_suite(suite, axis, method, set_, budget), data, needed=False)
    if not method:
        note_unused(plugin, chosen)
    ceilings = _ceilings(flops, bandwidth)
    asked = chosen.planned()
    cells = [planning.predict(case, ceilings) for case in asked]
    summary = planning.total(cells, chosen)
    if json:
        rows = [{**c.as_dict(), "budget": list(asked[c.case])} for c in cells]
        emit_json({"suite": chosen.name, "ceilings": ceilings.source, "cells": rows, "total": summary.as_dict()})
    else:
        _print(cells, asked, summary, ceilings)


def _ceilings(flops: float | None, bandwidth: float | None) -> "Ceilings":
    from attnbench.plan import H100, Ceilings

    if flops is None and bandwidth is None:
        return H100
    rates = H100.flops_per_s if flops is None else dict.fromkeys(H100.flops_per_s, flops * _TERA)
    given = [name for name, value in (("--flops", flops), ("--bandwidth", bandwidth)) if value is not None]
    moved = H100.bytes_per_s if bandwidth is None else bandwidth * _TERA
    return Ceilings(f"{' and '.join(given)}, the rest from: {H100.source}", moved, rates)


def _print(cells: "Sequence[Prediction]", asked: "Mapping[Case, tuple[int, ...]]", summary: "Total", ceilings: "Ceilings") -> None:
    from attnbench.case import names

    budgets, told = any(asked.values()), names(asked, params=False)
    rows = [
        {
            "cell": told[p.case],
            **({"budget": ", ".join(map(str, asked[p.case])) or "fixed"} if budgets else {}),
            "params": ", ".join(f"{k}={v}" for k, v in p.case.params if k != "causal" or v),
            "work": si(p.flops, "FLOP"),
            "traffic": si(p.bytes, "B"),
            "memory, at least": si(p.least_bytes, "B"),
            "time, at least": si(p.floor_s, "s"),
        }
        for p in cells
    ]
    emit_table(rows, right=["work", "traffic", "memory, at least", "time, at least"])
    print(f"{summary.cells} cells: {si(summary.flops, 'FLOP')} and at least {si(summary.floor_s, 's')} for one call of each")
    print(f"at least {si(summary.timed_s, 's')} of timed calls, beside gate and compilation")
    print(f"the largest cell holds at least {si(summary.largest_bytes, 'B')}")
    print(f"ceilings: {ceilings.source}")
