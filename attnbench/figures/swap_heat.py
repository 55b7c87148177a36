"""What is left of a trained model's accuracy when another method takes the place of its own, over two parameters of that method."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from attnbench import earned, frame, series
from attnbench.figures._multiples import failures
from attnbench.figures._style import LETTERS, WIDTHS, paper, wrapped
from attnbench.figures.accuracy import conditions, over_seeds, point
from attnbench.figures.swap_in import titled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

NAME = "swap_heat"
_ACROSS = 3
COLOURS = "cividis"
"""Matplotlib's name of a scale that colour-blind readers see as others do."""


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: `panel` (task, model, N), the method, `down` and `across` (parameters), `y` and `x` (their values).

    Then accuracy `value`, `low`, `high` as `attnbench.figures.accuracy.point` gives them, `sd` over seeds, and `before`, the mean accuracy
    of the model with its own method. Empty where no method was tried over two parameters.
    """
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table), swapped=True)
    if rows.empty or not (rows["status"] == "ok").any():
        return pd.DataFrame()
    rows = rows.assign(series=series.labels(rows.assign(params=rows["words"])))
    return pd.DataFrame([cell for _, part in rows.groupby(["panel", "n", "series"], sort=True) for cell in _cells(part)])


def _cells(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    values = pd.DataFrame([json.loads(own) for own in rows["own"]], index=rows.index).select_dtypes("number")
    names = [str(name) for name in values if values[name].nunique() > 1]
    if len(names) != 2:
        return
    down, across = sorted(names)
    kept = _grid(values, down, across)
    before = float(earned.before(rows).mean())
    for _, part in rows[kept].groupby([values.loc[kept, down], values.loc[kept, across]], sort=True):
        first = values.loc[part.index[0]]
        made = point(part, "accuracy")
        sd = float(part["accuracy"].std()) if made["status"] == "ok" and len(part) > 1 else float("nan")
        more = {"down": down, "across": across, "y": int(first[down]), "x": int(first[across]), "sd": sd, "before": before}
        yield {**made, **more, "panel": f"{made['panel']}, N={made['n']}"}


def _grid(values: pd.DataFrame, down: str, across: str) -> pd.Series[bool]:
    """Rows of which each parameter was tried with several values of the other: single ones are no grid."""
    kept = pd.Series(True, index=values.index)
    while True:
        known = values[kept]
        several = (known.groupby(down)[across].transform("nunique") > 1) & (known.groupby(across)[down].transform("nunique") > 1)
        if several.all():
            return kept
        kept[several.index[~several]] = False


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure; None where no method was tried over two parameters."""
    drawn = data(table)
    if drawn.empty or not (drawn["status"] == "ok").any():
        return None
    known = drawn[drawn["status"] == "ok"]
    keys = sorted({(p, s) for p, s in zip(known["panel"], known["series"], strict=True)}, key=lambda key: [series.natural(k) for k in key])
    width, across = WIDTHS[columns], min(len(keys), _ACROSS if columns > 1 else 1)
    down = -(-len(keys) // across)
    words = "Above each map the accuracy of the model with its own method."
    caption = f"{conditions(table, drawn)} {over_seeds(known).replace('range', 'standard deviation')} {words} {_failures(drawn)}"
    with paper():
        text = wrapped(caption.strip(), width)
        figure = Figure(figsize=(width, 2.3 * down + 0.3 + 0.115 * (text.count("\n") + 1)), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).flatten()
        limits = float(drawn["value"].min()), float(drawn["value"].max())
        for axes, (panel, name) in zip(panels, keys, strict=False):
            image = _draw(axes, drawn[(drawn["panel"] == panel) & (drawn["series"] == name)], limits)
        for axes in panels[len(keys) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=list(panels), label="test accuracy", shrink=0.6, aspect=30, pad=0.01)
        figure.supxlabel(text, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _failures(drawn: pd.DataFrame) -> str:
    """What letters stand for, and which maps are nothing else."""
    whole = drawn.groupby(["panel", "series"])["status"].transform(lambda status: (status != "ok").all())
    lost = sorted({f"{s} in {p}" for s, p in zip(drawn.loc[whole, "series"], drawn.loc[whole, "panel"], strict=True)}, key=series.natural)
    words = failures(drawn[~whole]).replace("Above the axes", "Letters")
    return " ".join(part for part in (words, f"Failed everywhere: {'; '.join(lost)}." if lost else "") if part)


def _draw(axes: Axes, part: pd.DataFrame, limits: tuple[float, float]) -> AxesImage:
    rows, columns = sorted(part["y"].unique()), sorted(part["x"].unique())
    grid = np.full((len(rows), len(columns)), np.nan)
    for p in part.to_dict("records"):
        grid[rows.index(p["y"]), columns.index(p["x"])] = p["value"]
    image = axes.imshow(grid, cmap=COLOURS, vmin=limits[0], vmax=limits[1], origin="lower", aspect="auto")
    for p in part.to_dict("records"):
        dark = p["status"] == "ok" and (p["value"] - limits[0]) < 0.55 * (limits[1] - limits[0])
        place = columns.index(p["x"]), rows.index(p["y"])
        axes.text(*place, _text(p), ha="center", va="center", fontsize=5.5, color="white" if dark else "black", linespacing=1.1)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    first = part.iloc[0]
    axes.set(xlabel=first["across"], ylabel=first["down"])
    axes.set_title(f"{first['series']} in {titled(first['panel'])}: {first['before']:.3f}", fontsize=6, pad=3)
    return image


def _text(p: dict[Any, Any]) -> str:
    if p["status"] != "ok":
        return LETTERS.get(str(p["status"]), "?")
    return f"{p['value']:.3f}" + (f"\n±{p['sd']:.3f}" if p["sd"] == p["sd"] else "")
