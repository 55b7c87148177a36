"""Plots to zoom into that no other figure has: heat maps, accuracy against cost, and maps of kept tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from attnbench import series
from attnbench.figures._bokeh import columns, figure, hover, source
from attnbench.figures._kept import DROPPED
from attnbench.figures._style import LETTERS
from attnbench.figures.swap_heat import COLOURS
from attnbench.tasks import routing, trained

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

_SHADES = 256


def costs(data: pd.DataFrame, axis: str) -> Any:
    """Accuracy against what a call costs: a point a method with its range over seeds, named in place, and the front."""
    from bokeh.models import LabelSet

    low, high = float(data["cost"].min()), float(data["cost"].max())
    room = 1.2 * (high / low) ** 0.05
    limits = low / room, high * room * (high / low) ** 0.3  # names stand at the right
    plot = figure(axis, "test accuracy", y_scale="linear", x_range=limits)
    plot.xaxis.ticker.desired_num_ticks = 5
    front = data[data["front"]].sort_values("cost")
    plot.step("cost", "value", mode="after", color="#777777", source=source(columns(front, "cost", "value")))
    names = [f"{s}{' (other parameters)' if d else ''}" for s, d in zip(data["series"], data["differs"], strict=True)]
    drawn = source(
        columns(
            data, "cost", "value", "low", "high", name=data["series"].tolist(), told=names, where=_where(data), seeds=data["seeds"].tolist()
        )
    )
    plot.segment("cost", "low", "cost", "high", color="color", line_width=1.5, alpha=0.7, source=drawn)
    spots = plot.scatter("cost", "value", size=10, color="color", marker="marker", alpha=0.9, hover_line_color="black", source=drawn)
    plot.add_layout(
        LabelSet(x="cost", y="value", text="name", text_color="color", x_offset=7, y_offset=3, text_font_size="8pt", source=drawn)
    )
    hover(plot, spots, ("method", "@told"), (axis, "@cost{0.000}"), ("accuracy", "@value{0.000}"),
                ("over @seeds seeds", "@low{0.000} to @high{0.000}"), ("cost from", "@where"))  # fmt: skip
    return plot


def _where(data: pd.DataFrame) -> list[str]:
    return [
        ", ".join(part for part in (source, apart, differs) if part)
        for source, apart, differs in zip(data["source"], data["apart"], data["differs"], strict=True)
    ]


def heat(data: pd.DataFrame) -> Any:
    """Accuracy over two parameters: a cell each, with its number, or the letter of its failure."""
    from bokeh.models import FactorRange

    ways = [[str(v) for v in sorted(data[name].unique())] for name in ("x", "y")]
    plot = figure(str(data["across"].iloc[0]), str(data["down"].iloc[0]), x_scale="", y_scale="", x_range=FactorRange(factors=ways[0]),
                        y_range=FactorRange(factors=ways[1]))  # fmt: skip
    low, high = float(data["value"].min()), float(data["value"].max())
    shares = [0.0 if np.isnan(v) else (v - low) / (high - low or 1.0) for v in data["value"]]
    ok = (data["status"] == "ok").tolist()
    drawn = source({
        **columns(data, "value", "low", "high", "sd", "before"), "x": data["x"].astype(str).tolist(), "y": data["y"].astype(str).tolist(),
        "fill": [to_hex(mpl.colormaps[COLOURS](share)) if good else "#ffffff" for share, good in zip(shares, ok, strict=True)],
        "ink": ["#ffffff" if good and share < 0.55 else "#000000" for share, good in zip(shares, ok, strict=True)],
        "text": [f"{v:.3f}" if s == "ok" else LETTERS.get(s, "?") for v, s in zip(data["value"], data["status"], strict=True)],
        "seeds": data["seeds"].tolist(), "status": data["status"].tolist(),
    })  # fmt: skip
    cells = plot.rect("x", "y", 1, 1, fill_color="fill", line_color="white", source=drawn)
    plot.text("x", "y", "text", text_color="ink", text_align="center", text_baseline="middle", text_font_size="9pt", source=drawn)
    hover(plot, cells, ("accuracy", "@value{0.000} ± @sd{0.000}"), ("over @seeds seeds", "@low{0.000} to @high{0.000}"),
                ("before the swap", "@before{0.000}"), ("status", "@status"))  # fmt: skip
    return plot


def maps(data: pd.DataFrame) -> Iterator[tuple[str, Any]]:
    """Kept tokens of each model, a map a layer, side by side: white where all heads keep a token, orange where none does."""
    palette = [to_hex(c) for c in LinearSegmentedColormap.from_list("kept", [DROPPED, "#ffffff"])(np.linspace(0, 1, _SHADES))]
    named = [
        (f"{p['series'].iloc[0]}, {p['panel'].iloc[0]}, N={p['n'].iloc[0]}", p) for _, p in data.groupby(["panel", "series"], sort=True)
    ]
    for title, part in sorted(named, key=lambda item: series.natural(item[0])):
        yield title, _row(part.sort_values("layer"), palette)


def _row(part: pd.DataFrame, palette: list[str]) -> Any:
    first = part.iloc[0]
    sides = trained.get(str(first["data"]).partition(":")[0]).grid(int(first["n"]))
    assert sides is not None, "maps are recorded of pictures alone"
    shares = [routing.unpacked(text, int(first["n"]))[0].reshape(sides)[::-1] / int(first["heads"]) for text in part["kept"]]
    plot = figure("layer", "", x_scale="", y_scale="", match_aspect=True)
    plot.xgrid.visible = plot.ygrid.visible = plot.yaxis.visible = False
    plot.xaxis.ticker = [layer + 0.5 for layer in part["layer"].tolist()]
    plot.xaxis.major_label_overrides = {
        layer + 0.5: f"{layer}: {pruned:.0%} dropped" for layer, pruned in zip(part["layer"], part["pruned"], strict=True)
    }
    drawn = source({
        "image": [np.round((_SHADES - 1) * share).astype(np.uint8) for share in shares], "x": [float(layer) for layer in part["layer"]],
        "y": [0.0] * len(part), "dw": [0.95] * len(part), "dh": [0.95 * sides[0] / sides[1]] * len(part),
        "series": part["series"].tolist(), "method": part["method"].tolist(),
    })  # fmt: skip
    from bokeh.models import LinearColorMapper

    plot.image(
        "image", x="x", y="y", dw="dw", dh="dh", color_mapper=LinearColorMapper(palette=palette, low=0, high=_SHADES - 1), source=drawn
    )
    plot.height, plot.background_fill_color = 220, "#eeeeee"
    return plot
