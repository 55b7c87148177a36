"""Every figure as a plot to zoom into, from the same data as the printed one. Drawn by Bokeh, whose script a page can hold whole.

Bokeh: https://bokeh.org. Each source has the columns `method` and `series`, by which a page may filter it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench import figures, series
from attnbench.errors import UserError
from attnbench.figures._facets import Facets
from attnbench.figures._multiples import BASELINE as BEST
from attnbench.figures._stages import GAPS, colour
from attnbench.figures._style import BASELINE, COLOURS, MARKERS, WORDS, length, marker
from attnbench.metrics import METRICS
from attnbench.taxonomy import Family

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

_MARKERS = ("circle", "square", "triangle", "inverted_triangle", "hex", "star", "diamond", "plus", "circle_cross", "square_pin",
            "triangle_pin", "star_dot", "square_x", "circle_dot")  # fmt: skip
_TOOLS = "pan,box_zoom,wheel_zoom,reset,save"
_FIRST = ("latency", "throughput", "memory", "efficiency", "fidelity", "recall", "pareto", "equal_width", "anatomy")
"""Figures in the order in which a reader asks; others follow."""
_BARS = 60
"""Bars of a cost anatomy in one plot, at most; the longest lengths are kept."""


@dataclass(frozen=True)
class Plot:
    """One plot of a page."""

    section: str
    """suite and device with their conditions; plots of one section stand together"""
    title: str
    item: str
    """JSON for `Bokeh.embed.embed_item`"""


def script() -> str:
    """Bokeh's own JavaScript, whole. Raises `UserError` where Bokeh is not installed."""
    _bokeh()
    from bokeh.resources import INLINE

    return "\n".join(INLINE.clone(components=["bokeh"]).js_raw)


def plots(table: pd.DataFrame) -> list[Plot]:
    """All plots that a results table allows, sections with most methods first. Devices and conditions are never pooled.

    Raises `UserError` where Bokeh is not installed.
    """
    _bokeh()
    found: list[Plot] = []
    methods: dict[str, int] = {}
    modules = figures.modules()
    for name in sorted(modules, key=_rank):
        for group in figures.parts(modules[name], table) if len(table) else ():
            data = modules[name].data(group.rows)
            if data.empty:
                continue
            own = group.rows[group.rows["suite"] == group.suite]
            section = f"{group.suite}: {series.describe(own)}"
            methods[section] = max(methods.get(section, 0), own["method"].nunique())
            facets = getattr(modules[name].data, "__self__", None)
            found += [Plot(section, title, _item(plot)) for title, plot in _drawn(name, data, facets)]
    return sorted(found, key=lambda plot: -methods[plot.section])  # stable: figures keep their order


def _rank(name: str) -> tuple[int, str]:
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)


def _bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise UserError("--html needs bokeh, which is not installed: pip install 'attnbench[report]'") from None


def _item(plot: Any) -> str:
    from bokeh.embed import json_item

    return json.dumps(json_item(plot), separators=(",", ":"))


def _drawn(name: str, data: pd.DataFrame, facets: object) -> Iterator[tuple[str, Any]]:
    words = name.replace("_", " ")
    if isinstance(facets, Facets):
        metric = METRICS[facets.metric]
        for panel in series.panel_order(data["panel"].unique()):
            yield f"{words}, {panel}", _lines(data[data["panel"] == panel], metric.axis, metric.scale)
    elif {"stage", "share"} <= set(data.columns):
        for panel in series.panel_order(data["panel"].unique()):
            yield f"{words}, {panel}", _bars(data[data["panel"] == panel])
    elif {"time_ms", "rel_error"} <= set(data.columns):
        panels = "panel" if "panel" in data else "profile"
        for panel in series.panel_order(data[panels].unique()):
            for n, part in data[data[panels] == panel].groupby("n", sort=True):
                yield f"{words}, {panel}, N={n}", _points(part)


def _figure(x: str, y: str, *, x_scale: str = "log", y_scale: str = "log", **more: Any) -> Any:
    from bokeh.plotting import figure

    scales = {k: v for k, v in (("x_axis_type", x_scale), ("y_axis_type", y_scale)) if v}
    plot = figure(height=420, sizing_mode="stretch_width", tools=_TOOLS, active_drag="box_zoom", **scales, **more)
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.axis_label, plot.yaxis.axis_label = x, y
    plot.grid.grid_line_color = "#e6e6e6"
    return plot


def _hover(plot: Any, renderer: Any, *lines: tuple[str, str]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=[renderer], tooltips=list(lines), attachment="horizontal", visible=False))


def _lines(data: pd.DataFrame, axis: str, scale: str) -> Any:
    """A metric against length: a line a series, whiskers, failures above, the noise floor as a band."""
    plot = _figure("sequence length N", axis, y_scale=scale)
    ticks = sorted(int(n) for n in data["n"].unique())
    plot.xaxis.ticker, plot.xaxis.major_label_overrides = ticks, {n: length(n) for n in ticks}
    drawn = data[(data["status"] == "ok") & data["value"].notna()]
    parts = [(str(name), part.sort_values("n")) for name, part in drawn.groupby("series", sort=False)]
    _bands(plot, parts)
    styled = [(name, part, BASELINE if name == BEST else _tone(part)) for name, part in parts]
    plot.multi_line("xs", "ys", color="color", line_width=1.6, alpha=0.9, hover_line_width=4, source=_source({
        "xs": [_floats(p["n"]) for _, p, _ in styled], "ys": [_floats(p["value"]) for _, p, _ in styled], "color": [c for *_, c in styled],
        "series": [name for name, *_ in styled], "method": [str(p["method"].iloc[0]) for _, p, _ in styled],
    }))  # fmt: skip
    whole = _columns(drawn, "n", "value", "low", "high", ran=drawn["ran"].astype(str).tolist())
    plot.segment("n", "low", "n", "high", color="color", line_width=1, alpha=0.6, source=_source(whole))
    spots = plot.scatter("n", "value", size=8, color="color", marker="marker", hover_line_color="black", source=_source(whole))
    _hover(plot, spots, ("method", "@series (@ran)"), ("N", "@n{0}"), (axis, "@value{0.0000a}"), ("range", "@low{0.000a} to @high{0.000a}"))
    _failures(plot, data[data["status"] != "ok"], drawn, scale)
    return plot


def _bands(plot: Any, parts: list[tuple[str, pd.DataFrame]]) -> None:
    noisy = [(name, part[part["floor"].notna()]) for name, part in parts if part["floor"].notna().any()]
    outlines = [(_floats(p["n"]), _floats(p["value"] * (1 + p["floor"])), _floats(p["value"] * (1 - p["floor"]))) for _, p in noisy]
    if noisy:
        plot.patches("xs", "ys", color="#888888", alpha=0.25, source=_source({
            "xs": [n + n[::-1] for n, _, _ in outlines], "ys": [up + down[::-1] for _, up, down in outlines],
            "series": [name for name, _ in noisy], "method": [str(p["method"].iloc[0]) for _, p in noisy],
        }))  # fmt: skip


def _failures(plot: Any, failed: pd.DataFrame, drawn: pd.DataFrame, scale: str) -> None:
    if failed.empty:
        return
    top = float(drawn["value"].max()) if len(drawn) else 1.0
    rank = failed.groupby("n").cumcount()
    step = 1.12**rank if scale == "log" else 1 + 0.03 * rank
    data = _columns(failed, "n", why=[WORDS.get(s, s) for s in failed["status"]], y=_floats(1.6 * top * step))
    marks = plot.scatter("n", "y", size=9, marker="x", color="color", line_width=2, alpha=0.8, source=_source(data))
    _hover(plot, marks, ("method", "@series"), ("N", "@n{0}"), ("failed", "@why"))


def _points(data: pd.DataFrame) -> Any:
    """Fidelity against time: a point a configuration."""
    plot = _figure("time per call (ms)", METRICS["rel_error"].axis)
    plot.xaxis.ticker.desired_num_ticks = 5
    data = data[(data["rel_error"] > 0) & (data["time_ms"] > 0)]
    more = [f"budget {b}" for b in data["budget"]] if "budget" in data else data["params"].tolist()
    spots = plot.scatter("time_ms", "rel_error", size=10, color="color", marker="marker", alpha=0.85, hover_line_color="black",
                         source=_source(_columns(data, "time_ms", "rel_error", more=more)))  # fmt: skip
    _hover(plot, spots, ("method", "@series"), ("time", "@time_ms{0.000} ms"), ("error", "@rel_error{0.000e}"), ("parameters", "@more"))
    return plot


def _bars(data: pd.DataFrame) -> Any:
    """Shares of the stages of a call: a bar a method and length."""
    from bokeh.models import FactorRange, Legend

    data = data.assign(method=[str(label).partition("@")[0] for label in data["label"]])
    data = data.assign(bar=[f"{s}, N={n}" for s, n in zip(data["series"], data["n"], strict=True)])
    bars = list(dict.fromkeys(data.sort_values("n", ascending=False, kind="stable")["bar"]))[:_BARS]
    data = data[data["bar"].isin(bars)]
    right = data.groupby("bar")["share"].cumsum()
    plot = _figure("share of a call", "", x_scale="", y_scale="", y_range=FactorRange(factors=list(dict.fromkeys(data["bar"]))[::-1]))
    plot.height = 130 + 22 * len(bars)
    plot.add_layout(Legend(orientation="horizontal", ncols=5, label_text_font_size="8pt", border_line_color=None, padding=0), "below")
    columns = _columns(data, "share", "time_ms", "floor_ms", bar=data["bar"].tolist(), stage=data["stage"].tolist(), right=_floats(right),
                       left=_floats(right - data["share"]))  # fmt: skip
    columns["color"] = ["#eeeeee" if stage == GAPS else colour(stage) for stage in data["stage"]]
    drawn = plot.hbar(y="bar", left="left", right="right", height=0.8, color="color", line_color="white", source=_source(columns),
                     legend_group="stage")  # fmt: skip
    _hover(plot, drawn, ("method", "@bar"), ("stage", "@stage"), ("time", "@time_ms{0.0000} ms"), ("share", "@share{0.0%}"),
           ("roofline floor", "@floor_ms{0.0000} ms"))  # fmt: skip
    return plot


def _columns(data: pd.DataFrame, *numbers: str, **more: list[Any]) -> dict[str, list[Any]]:
    named = {"series": data["series"].astype(str).tolist(), "method": data["method"].astype(str).tolist()}
    looks = {
        "color": [BASELINE if s == BEST else COLOURS[_family(f)] for s, f in zip(data["series"], data["family"], strict=True)],
        "marker": [_MARKERS[MARKERS.index(marker(m)) % len(_MARKERS)] for m in data["method"].astype(str)],
    }
    return {**{name: _floats(data[name]) for name in numbers}, **named, **looks, **more}


def _family(name: str) -> Family | None:
    return Family(name) if name in set(Family) else None


def _tone(part: pd.DataFrame) -> str:
    return COLOURS[_family(str(part["family"].iloc[0]))]


def _floats(values: Any) -> list[float]:
    return [float(f"{v:.5g}") for v in np.asarray(values, dtype=float)]


def _source(columns: dict[str, list[Any]]) -> Any:
    from bokeh.models import ColumnDataSource

    return ColumnDataSource(columns)


def legend() -> dict[str, str]:
    """Family -> its colour."""
    return {str(family): tone for family, tone in COLOURS.items() if family}
