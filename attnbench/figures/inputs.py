"""Distance from softmax attention on generated inputs beside captured ones, as a heat map with its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from attnbench import frame, series
from attnbench.figures._style import LETTERS, WIDTHS, WORDS, paper, wrapped

NAME = "inputs"
_COLOURS = "cividis_r"
"""Matplotlib's name of a scale that colour-blind readers see as others do; dark is far from softmax."""
_LIMITS = 0.01, 3.0
"""relative errors beyond which the colour no longer changes"""
MANY = 5
"""inputs whose numbers do not fit beside the methods' names in one column of a page"""
_DARK = 0.23
"""relative error from which a number is written in white"""


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: `series`, `family`, `profile` (as drawn), `source` (as the case has it), `n`, `status`, `value` (relative error).

    Of the longest sequence that captured inputs were read at; median over seeds. Empty where no inputs were captured.
    """
    if table.empty or "profile" not in table:
        return pd.DataFrame()
    series.one_device(table)
    rows = frame.current(table)
    rows = rows[(rows["task"] == "fidelity") & (rows["replicate"] == 0)]
    captured = rows[rows["profile"].str.startswith(series.FILE) & (rows["status"] == "ok")]
    if captured.empty:
        return pd.DataFrame()
    rows = rows[rows["n"] == captured["n"].max()]
    rows = rows[[not series.exact(str(name)) for name in rows["method"]]]
    if rows.empty or not (rows["status"] == "ok").any():
        return pd.DataFrame()
    names = series.profile_titles(rows["profile"])
    rows = rows.assign(series=series.labels(rows))
    return pd.DataFrame([_cell(part, names) for _, part in rows.groupby(["series", "profile"], sort=True)])


def _cell(part: pd.DataFrame, names: dict[str, str]) -> dict[str, Any]:
    first, failed = part.iloc[0], [s for s in part["status"] if s != "ok"]
    return {
        "series": first["series"], "family": str(series.family(str(first["method"])) or "other"), "profile": names[first["profile"]],
        "source": first["profile"], "n": int(first["n"]), "status": failed[0] if failed else "ok",
        "value": np.nan if failed else float(part["rel_error"].median()),
    }  # fmt: skip


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where no inputs were captured. Of more than `MANY` inputs it is as wide as two columns whatever is asked for."""
    drawn = data(table)
    if drawn.empty:
        return None
    columns = 2 if drawn["profile"].nunique() > MANY else columns
    known = drawn.drop_duplicates("series").sort_values("series", key=lambda s: s.map(series.natural))
    order = sorted(zip(known["family"], known["series"], strict=True), key=lambda x: series.family_rank(x[0]))
    down, across = [name for _, name in order], _ordered(drawn)
    grid = drawn.pivot_table(index="series", columns="profile", values="value", dropna=False).reindex(down, columns=across)
    with paper():
        text = wrapped(_caption(table, drawn), WIDTHS[columns])
        height = 0.155 * len(down) + 0.55 + 0.115 * (text.count("\n") + 1)
        figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, cmap=_COLOURS, norm=LogNorm(*_LIMITS, clip=True), aspect="auto")
        for p in drawn.to_dict("records"):
            good = p["status"] == "ok"
            said = f"{p['value']:.3f}" if good else LETTERS.get(str(p["status"]), "?")
            colour = "white" if good and p["value"] > _DARK else "black"
            axes.text(across.index(p["profile"]), down.index(p["series"]), said, ha="center", va="center", fontsize=5.5, color=colour)
        axes.set_xticks(range(len(across)), across)
        axes.set_yticks(range(len(down)), down)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for edge in [i for i in range(1, len(order)) if order[i][0] != order[i - 1][0]]:
            axes.axhline(edge - 0.5, color="white", linewidth=1.6)
        axes.axvline(sum(not s.startswith(series.FILE) for s in drawn["source"].unique()) - 0.5, color="white", linewidth=3)
        figure.colorbar(image, ax=axes, label="relative error against softmax", extend="both", aspect=40, pad=0.01)
        figure.supxlabel(text, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _ordered(drawn: pd.DataFrame) -> list[str]:
    """Generated inputs, then captured ones."""
    files = drawn["source"].str.startswith(series.FILE)
    captured = sorted(drawn.loc[files, "profile"].unique(), key=series.natural)
    return series.panel_order(drawn.loc[~files, "profile"].unique()) + captured


def _caption(table: pd.DataFrame, drawn: pd.DataFrame) -> str:
    rows = table[(table["task"] == "fidelity") & (table["n"] == drawn["n"].iloc[0])]
    failed = sorted(set(drawn["status"]) - {"ok"})
    parts = [
        f"{series.describe(rows)}, N={drawn['n'].iloc[0]}. {series.captured(drawn['source'])}",
        f"Median over {rows['seed'].nunique()} seeds." if rows["seed"].nunique() > 1 else "",
        f"Letters: {', '.join(f'{LETTERS[s]} {WORDS[s]}' for s in failed)}." if failed else "",
        series.settings(rows[[not series.exact(str(name)) for name in rows["method"]]]),
    ]
    return " ".join(part for part in parts if part)
