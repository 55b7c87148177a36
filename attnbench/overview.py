"""Every method in one row: what a query reads, what that costs, how long it takes, how far it is from softmax, and where it comes from.

Counts are those of the cost models with the parameters of a suite; times and errors are those of records with the same parameters.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd
import torch

from attnbench import fastweights, joining, series, suite_file, taxonomy
from attnbench.errors import UserError
from attnbench.inputs import draw
from attnbench.method import Shape
from attnbench.registry import get
from attnbench.typeset import NONE, figures

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnbench.method import Method, Params
    from attnbench.suite import Suite

SUITE = "speed"
"""Suite whose parameters and shape are costed."""
_READ_N = 4096
"""the longest sequence at which hidden units are counted in the fast weights themselves"""


def rows(methods: Iterable[Method], n: int, table: pd.DataFrame | None = None) -> tuple[list[dict[str, str]], list[str]]:
    """One row a method for a forward pass at N, and sentences that say what the columns are. Raises `UserError`.

    With `table`, records as `frame.load` returns them, measured columns are added.
    """
    if n < 1:
        raise UserError(f"--n {n} must be at least 1")
    chosen, axes = suite_file.load(SUITE), {key: values[0] for key, values in suite_file.load(SUITE).axes.items() if len(values) == 1}
    place = {key: axes[key] for key in ("batch", "heads", "dim", "dtype")}
    shape = Shape(axes["batch"], axes["heads"], n, axes["dim"])
    item = getattr(torch, axes["dtype"]).itemsize
    settings = {row["name"]: _params(get(row["name"]), chosen, shape) for row in taxonomy.rows(list(methods))}
    measured, notes = _measured(settings, n, table, place) if table is not None and not table.empty else ({}, [])
    found = []
    for name, params in settings.items():
        method = get(name)
        cost = method.cost(shape, params)
        found.append(
            {
                "method": method.title,
                "name": name,
                f"units read, N={min(n, _READ_N)}": _reads(method, min(n, _READ_N), shape.dim),
                f"GFLOP, N={n}": figures(cost.total() / 1e9),
                f"MB, N={n}": figures(cost.bytes(item) / 1e6),
                **measured.get(name, {}),
                "source": f"{method.citation.short}, {method.citation.url}",
            }
        )
    told = f"Forward, B={shape.batch}, H={shape.heads}, D={shape.dim}, {axes['dtype']}, parameters of the suite {SUITE}."
    return found, [told, *notes]


def _params(method: Method, chosen: Suite, shape: Shape) -> Params:
    """The first setting that the suite has for the method, else its defaults; fitted where that makes no sense at this length."""
    entry = next((e for e in chosen.methods if get(e.name).name == method.name), None)
    params = method.parse({key: values[0] for key, values in entry.params.items()} if entry else {})
    return params.fitted(shape) if params.problems(shape) else params


def _reads(method: Method, n: int, dim: int) -> str:
    """Hidden units that a query reads on average, counted in the fast weights of two heads; `all N` where they are the keys."""
    if method.experts is None:
        return NONE
    shape = Shape(1, 2, n, dim)
    params = _params(method, suite_file.load(SUITE), shape)
    width = fastweights.width_per_query(method.experts(*draw("randn", shape, 0, torch.float32, "cpu"), params))
    return "all N" if width >= n and method.exact else figures(width, max(1, len(str(round(width)))))


def _measured(
    settings: Mapping[str, Params], n: int, table: pd.DataFrame, place: Mapping[str, object]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Name -> measured columns, and where they come from."""
    device = str(table.loc[table["task"] == "speed", "device"].value_counts().idxmax()) if (table["task"] == "speed").any() else ""
    asked = {name: json.dumps(params.as_dict(), sort_keys=True) for name, params in settings.items()}
    wanted = pd.DataFrame([{**place, "device": device, "method": m, "label": m, "params": p} for m, p in asked.items()])
    columns: dict[str, dict[str, str]] = {name: {} for name in settings}
    notes = []
    for what, source in (("Times", joining.costs(table, wanted, n)), ("Errors", joining.distances(table, wanted, n))):
        if source is None:
            continue
        notes.append(f"{what}: {source}, N={source.n}.")
        profiles = series.panel_order(source.rows["profile"].unique()) if what == "Errors" else []
        for name, params in asked.items():
            same = source.find(name, name, params)
            same = None if same is None or same.differs else same
            if what == "Times":
                time = float("nan") if same is None else same.median("time_s")
                columns[name][f"ms, N={source.n}"] = NONE if time != time else figures(time * 1e3)  # noqa: PLR0124 (NaN)
            else:
                errors = {} if same is None else same.by_profile("rel_error")
                columns[name] |= {f"error, {p}, N={source.n}": f"{errors[p]:.2g}" if p in errors else NONE for p in profiles}
    return columns, notes
