"""Which pixels the experts of trained models keep, layer by layer: a figure for each task of pictures and length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from attnbench import earned, frame, series
from attnbench.errors import UserError
from attnbench.figures._examples import picture
from attnbench.figures._kept import shade
from attnbench.figures._style import WIDTHS, paper, wrapped
from attnbench.figures.accuracy import conditions
from attnbench.store import device_slug
from attnbench.tasks import routing, trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

NAME = "kept"
ROWS = 8
"""models in one figure, at most; the caption names those left out"""


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """A group for each trained task and length."""
    for group in series.groups(table[table["task"] == earned.TASK]):
        titles = earned.titles(group.rows["data"])
        for _, rows in group.rows.groupby(["data", "n"], sort=True):
            name = device_slug(titles[str(rows["data"].iloc[0])])
            yield group._replace(rows=rows, place=f"{group.place}-{name}-{rows['n'].iloc[0]}")


def data(table: pd.DataFrame) -> pd.DataFrame:
    """One row a model and layer: its first seed, the share `pruned` of that layer and `kept`, the map as its record packs it.

    `attnbench.tasks.routing.unpacked` reads a map: heads in which some expert keeps each token of the first test examples. Models that
    drop nothing are absent, and so are those of sequences.
    """
    if table.empty or earned.TASK not in set(table["task"]):
        return pd.DataFrame()
    rows = earned.asked(frame.current(table))
    rows = rows[rows["status"] == "ok"]
    found = []
    for _, part in rows.groupby(["panel", "n", "series"], sort=True):
        first = part.sort_values("seed").iloc[0]
        training = first["training"]
        if training.kept and max(training.pruned) > 0:
            told = {key: first[key] for key in ("panel", "data", "n", "batch", "heads", "series", "method", "seed")}
            layers = enumerate(zip(training.pruned, training.kept, strict=True))
            found += [{**told, "layer": layer, "pruned": pruned, "kept": kept} for layer, (pruned, kept) in layers]
    return pd.DataFrame(found)


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """A row a model: the first test picture, then once a layer with colour over what experts drop. None where nothing was dropped."""
    drawn = data(table)
    if drawn.empty:
        return None
    models = sorted(
        {(p, s) for p, s in zip(drawn["panel"], drawn["series"], strict=True)}, key=lambda key: [series.natural(k) for k in reversed(key)]
    )
    depth, width = int(drawn["layer"].max()) + 1, WIDTHS[columns]
    side = (width - 1.1) / (depth + 1)
    image = _picture(drawn)
    with paper():
        text = wrapped(_caption(table, drawn, models, pictured=image is not None), width)
        rows = models[:ROWS]
        figure = Figure(figsize=(width, len(rows) * (side + 0.16) + 0.3 + 0.115 * (text.count("\n") + 1)), layout="constrained")
        axes = figure.subplots(len(rows), depth + 1, squeeze=False)
        for (panel, name), line in zip(rows, axes, strict=True):
            own = drawn[(drawn["panel"] == panel) & (drawn["series"] == name)]
            shade(line[0], image, None)
            _label(line[0], "\n".join([name, *panel.split(", ")]))
            for cell, layer in zip(line[1:], own.sort_values("layer").to_dict("records"), strict=False):
                shade(cell, image, _share(layer["kept"], int(layer["n"]), int(layer["heads"]), str(layer["data"])))
                cell.set_title(f"layer {layer['layer']}: {layer['pruned']:.0%}", fontsize=6, pad=2)
            for cell in line[1 + len(own) :]:
                cell.set_axis_off()
        figure.supxlabel(text, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    return figure


def _label(axes: object, text: str) -> None:
    axes.text(-0.06, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=6)  # type: ignore[attr-defined]


def _share(text: str, n: int, heads: int, task: str) -> np.ndarray:
    """`[H, W]`: share of heads in which some expert keeps each token of the first test example."""
    sides = trained.get(task.partition(":")[0]).grid(n)
    assert sides is not None, "maps are recorded of pictures alone"
    share: np.ndarray = routing.unpacked(text, n)[0].reshape(sides) / heads
    return share


def _picture(drawn: pd.DataFrame) -> np.ndarray | None:
    """The first test example, as training drew it; None where its data or package are not here."""
    first = drawn.iloc[0]
    n = int(first["n"])
    try:
        task = trained.get(str(first["data"]))
        return picture(task, task.batch("test", 0, int(first["batch"]), n, 0).inputs[0].numpy(), n)
    except UserError:
        return None


def _caption(table: pd.DataFrame, drawn: pd.DataFrame, models: list[tuple[str, str]], *, pictured: bool) -> str:
    left = f" Not drawn: {'; '.join(f'{name} on {panel}' for panel, name in models[ROWS:])}." if len(models) > ROWS else ""
    words = "The first test example, the first seed of each; orange over tokens that no expert keeps, the stronger in the more heads."
    blank = "" if pictured else " The example itself could not be read here."
    return f"N={drawn['n'].iloc[0]}, {conditions(table, drawn)} {words} Above: share of such tokens over several examples.{left}{blank}"
