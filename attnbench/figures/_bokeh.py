"""What all plots to zoom into share: axes, hints, and the columns by which a page filters them. Drawn by Bokeh, imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench.figures._multiples import BASELINE as BEST
from attnbench.figures._style import BASELINE, COLOURS, MARKERS, marker
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    import pandas as pd

_MARKERS = ("circle", "square", "triangle", "inverted_triangle", "hex", "star", "diamond", "plus", "circle_cross", "square_pin",
            "triangle_pin", "star_dot", "square_x", "circle_dot")  # fmt: skip
_TOOLS = "pan,box_zoom,wheel_zoom,reset,save"


def figure(x: str, y: str, *, x_scale: str = "log", y_scale: str = "log", **more: Any) -> Any:
    """An empty plot between two labelled axes; an empty scale leaves the axis to the ranges in `more`."""
    from bokeh.plotting import figure as make

    scales = {k: v for k, v in (("x_axis_type", x_scale), ("y_axis_type", y_scale)) if v}
    plot = make(height=420, sizing_mode="stretch_width", tools=_TOOLS, active_drag="box_zoom", **scales, **more)
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.axis_label, plot.yaxis.axis_label = x, y
    plot.grid.grid_line_color = "#e6e6e6"
    return plot


def hover(plot: Any, renderer: Any, *lines: tuple[str, str]) -> None:
    """Tell lines of (name, value) of a mark that is pointed at."""
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=list(lines), attachment="horizontal", visible=False))


def columns(data: pd.DataFrame, *numbers: str, **more: list[Any]) -> dict[str, list[Any]]:
    """Columns of a source: the numbers named, series and method, colour and marker of each row, and `more`."""
    named = {"series": data["series"].astype(str).tolist(), "method": data["method"].astype(str).tolist()}
    looks = {
        "color": [BASELINE if s == BEST else COLOURS[_family(f)] for s, f in zip(data["series"], data["family"], strict=True)],
        "marker": [_MARKERS[MARKERS.index(marker(m)) % len(_MARKERS)] for m in data["method"].astype(str)],
    }
    return {**{name: floats(data[name]) for name in numbers}, **named, **looks, **more}


def _family(name: str) -> Family | None:
    return Family(name) if name in set(Family) else None


def tone(part: pd.DataFrame) -> str:
    """Colour of the series that a part is of."""
    return COLOURS[_family(str(part["family"].iloc[0]))]


def floats(values: Any) -> list[float]:
    """To 5 significant figures: a page holds many."""
    return [float(f"{v:.5g}") for v in np.asarray(values, dtype=float)]


def source(values: dict[str, list[Any]]) -> Any:
    """What glyphs draw from; a page filters it by its columns `method` and `series`."""
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(values)
