"""Trained accuracy against sequence length, a panel for each task: mean over seeds, with their range. `scores` has tasks of one length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench import earned, frame, series
from attnbench.figures._multiples import baseline, draw, failures
from attnbench.figures._style import paper
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

NAME = "accuracy"


def data(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `points`, of tasks that were asked at several lengths where there are any, with the best dense method of many."""
    found = points(table)
    return with_baseline(asked_at_several(found)) if len(found) else found


def points(table: pd.DataFrame) -> pd.DataFrame:
    """One row a series, panel and N, as `point` gives it, and the `chance` of a guess; empty where no seed of any was trained."""
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    made = [
        {**point(part, "accuracy"), "chance": chance(part)} for _, part in rows.groupby(["panel", "series", "n"], sort=True) if len(part)
    ]
    return pd.DataFrame(made if any(p["status"] == "ok" for p in made) else [])


def asked_at_several(drawn: pd.DataFrame) -> pd.DataFrame:
    """Rows of the panels that have several lengths, where a line is more than a point; all where none has."""
    several = drawn.groupby("panel")["n"].transform("nunique") > 1
    return drawn[several] if several.any() else drawn


def with_baseline(drawn: pd.DataFrame) -> pd.DataFrame:
    """The rows, and where series are many the best dense method of each panel once more, of `kind` `baseline`."""
    rows = [{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")]
    return pd.DataFrame([*rows, *baseline(rows, "accuracy")])


def point(part: pd.DataFrame, column: str) -> dict[str, Any]:
    """Seeds of one series at one place: `value` is their mean, `low` and `high` their range.

    NaN where one failed, whose `status` is told: survivors alone are never averaged. `seeds` counts all.
    """
    failed = part.loc[part["status"] != "ok", "status"].tolist()
    values = [] if failed else [float(v) for v in part[column]]
    return spread(part, values, panel=str(part["panel"].iloc[0]), n=int(part["n"].iloc[0]), status=failed[0] if failed else "ok")


def spread(part: pd.DataFrame, values: Sequence[float], *, panel: str, n: float, status: str = "ok") -> dict[str, Any]:
    """A row of what is drawn: the mean and the range of `values`, which seeds of one series have at the place `n` of a panel."""
    first = part.iloc[0]
    return {
        "kind": "series", "panel": panel, "family": str(series.family(str(first["method"])) or "other"), "series": str(first["series"]),
        "label": str(first["label"]), "method": str(first["method"]), "params": str(first["own"]), "ran": str(first["implementation"]),
        "n": n, "value": sum(values) / len(values) if values else float("nan"), "low": min(values, default=float("nan")),
        "high": max(values, default=float("nan")), "seeds": len(part), "status": status, "floor": float("nan"),
    }  # fmt: skip


def chance(part: pd.DataFrame) -> float:
    """Accuracy of a guess; NaN where nothing was trained."""
    known = [t.chance for t in part["training"] if hasattr(t, "chance")] if "training" in part else []
    return known[0] if known else float("nan")


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where nothing was trained."""
    drawn = data(table)
    if drawn.empty:
        return None
    levels = drawn.groupby("panel")["chance"].max().dropna()
    told = caption(table, drawn, after=f"Dotted: a guess. {failures(drawn)}")
    with paper():
        order = sorted(drawn["panel"].unique(), key=series.natural)
        return draw(drawn, told, METRICS["accuracy"], columns, order=order, most=5, levels={str(k): float(v) for k, v in levels.items()})


def caption(table: pd.DataFrame, drawn: pd.DataFrame, before: str = "", after: str = "") -> str:
    """Small print of what was trained: conditions, `before`, how many seeds a point stands for, `after`, and what is grey."""
    grey = "Grey: the best dense method." if (drawn["kind"] == "baseline").any() else ""
    return " ".join(part for part in (conditions(table, drawn), before, over_seeds(drawn), after, grey) if part)


def conditions(table: pd.DataFrame, drawn: pd.DataFrame) -> str:
    """How the models of a table were trained, and what the labels leave out of the methods that are drawn."""
    rows = table[table["task"] == earned.TASK]
    shown = rows[rows["method"].isin(drawn["method"])]
    told = f"{series.describe(shown)}. {series.settings(shown)}".strip()
    steps = earned.all_steps(earned.asked(shown))
    again = earned.several_models(earned.asked(frame.current(rows), swapped=True))  # models are told apart by all that they ran with
    return " ".join(part for part in (told, f"{steps}." if steps else "", again) if part)


def over_seeds(drawn: pd.DataFrame) -> str:
    """How many seeds a point stands for, and which points stand for fewer."""
    own = drawn[drawn["kind"] == "series"]
    most = int(own["seeds"].max())
    fewer = own[own["seeds"] < most].drop_duplicates(["series", "panel"])
    names = sorted((f"{s} at {p}" for s, p in zip(fewer["series"], fewer["panel"], strict=True)), key=series.natural)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    told = f" Fewer: {'; '.join(names[:4])}{more}." if names else ""
    return f"Mean and range over {most} seed{'s' if most > 1 else ''}.{told}"
