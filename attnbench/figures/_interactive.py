"""Every figure as a plot to zoom into, from the same data as the printed one. Drawn by Bokeh, whose script a page can hold whole.

Bokeh: https://bokeh.org. Each source has the columns `method` and `series`, by which a page may filter it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnbench import figures, series
from attnbench.errors import UserError
from attnbench.figures import _interactive_trained, crossover, curves, equal_width, scores, slices, swap_in
from attnbench.figures._bokeh import columns, figure, floats, hover, source, tone
from attnbench.figures._earned import Against
from attnbench.figures._facets import Facets
from attnbench.figures._interactive_dots import dots
from attnbench.figures._interactive_rows import in_rows
from attnbench.figures._multiples import BASELINE as BEST
from attnbench.figures._panel import Across, band, cut
from attnbench.figures._ranked import fits
from attnbench.figures._routed import Routed
from attnbench.figures._stages import GAPS, colour
from attnbench.figures._style import BASELINE, COLOURS, WORDS, length
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pandas as pd

    from attnbench.metrics import Metric

_FIRST = ("latency", "throughput", "memory", "efficiency", "fidelity", "recall", "pareto", "equal_width", "crossover", "energy", "anatomy",
          "scores", "accuracy", "accuracy_time", "accuracy_memory", "curves", "slices", "swap_in", "swap_heat", "pruned",
          "pruned_length")  # fmt: skip
"""Figures in the order in which a reader asks; others follow."""
_TRAINED = {
    "accuracy": (Across(), METRICS["accuracy"]),
    "curves": (Across(curves.LABEL, powers=False, curves=True), replace(METRICS["accuracy"], label="validation accuracy")),
    "slices": (Across(slices.LABEL), METRICS["accuracy"]),
    "swap_in": (Across(swap_in.LABEL), METRICS["accuracy"]),
}
"""Figure of trained accuracy -> what its lines run along, and the value axis."""
_BARS = 100
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


def plots(table: pd.DataFrame, follow: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> list[Plot]:
    """All plots that a results table allows, sections with most methods first. Devices and conditions are never pooled.

    `follow` passes on what is planned, as in `attnbench.figures.drawn`.

    Raises `UserError` where Bokeh is not installed.
    """
    _bokeh()
    found: list[Plot] = []
    methods: dict[str, int] = {}
    sections = _sections(table)
    for module, group in follow(sorted(figures.planned(table), key=lambda one: _rank(one[0].NAME))):
        data = module.data(group.rows)
        if data.empty:
            continue
        own = group.rows[group.rows["suite"] == group.suite]
        section = sections[group.suite, str(own["case_id"].iloc[0])]
        methods[section] = max(methods.get(section, 0), own["method"].nunique())
        facets = getattr(module.data, "__self__", None)
        found += [Plot(section, title, _item(plot)) for title, plot in _drawn(module.NAME, data, facets)]
    return sorted(found, key=lambda plot: -methods[plot.section])  # stable: figures keep their order


def _sections(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(suite, case id) -> the section of its group, whatever part of that a figure shows."""
    groups = series.groups(table) if len(table) else ()
    return {(g.suite, str(case)): f"{g.suite}: {series.describe(g.rows)}" for g in groups for case in g.rows["case_id"]}


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
    if isinstance(facets, Against):
        yield from ((f"{words}, {panel}", _interactive_trained.costs(part, METRICS[facets.metric].axis)) for panel, part in _panels(data))
    elif {"x", "y", "down", "across"} <= set(data.columns):
        for panel, part in _panels(data[data["value"].notna().groupby([data["panel"], data["series"]]).transform("any")]):
            yield from ((f"{words}, {s} in {panel}", _interactive_trained.heat(own)) for s, own in part.groupby("series", sort=True))
    elif "kept" in data.columns:
        yield from ((f"{words}, {title}", plot) for title, plot in _interactive_trained.maps(data))
    elif name == scores.NAME:
        yield from ((f"{words}, {panel}", dots(part, METRICS["accuracy"])) for panel, part in _panels(data))
    elif isinstance(facets, Facets) and fits(data):
        yield from ((f"{words}, {panel}, N={part['n'].iloc[0]}", dots(part, METRICS[facets.metric])) for panel, part in _panels(data))
    elif (axes := _axes(name, facets)) is not None:
        along, metric = axes
        for panel, part in _panels(data):
            yield f"{words}, {panel}", _lines(part, along, metric)
    elif {"stage", "share"} <= set(data.columns):
        yield from ((f"{words}, {panel}", _bars(part)) for panel, part in _panels(data))
    elif name == crossover.NAME or (name == equal_width.NAME and not equal_width.timed(data)):
        yield from ((f"{words}, {title}", plot) for title, plot in in_rows(data))
    elif {"time_ms", "rel_error"} <= set(data.columns):
        for panel, whole in _panels(data, "panel" if "panel" in data else "profile"):
            yield from ((f"{words}, {panel}, N={n}", _points(part)) for n, part in whole.groupby("n", sort=True))


def _panels(data: pd.DataFrame, column: str = "panel") -> Iterator[tuple[str, pd.DataFrame]]:
    return ((panel, data[data[column] == panel]) for panel in series.panel_order(data[column].unique()))


def _axes(name: str, facets: object) -> tuple[Across, Metric] | None:
    """What the lines of a figure run along, and what is on the value axis; None where it has no lines."""
    if isinstance(facets, Facets):
        return Across(), METRICS[facets.metric]
    return (facets.along, facets.metric) if isinstance(facets, Routed) else _TRAINED.get(name)


def _lines(data: pd.DataFrame, along: Across, metric: Metric) -> Any:
    """A metric along lengths, steps or layers: a line a series, whiskers, failures above, the noise floor as a band.

    Of curves little is drawn beside the lines.
    """
    plot = figure(along.label, metric.axis, x_scale="log" if along.powers else "linear", y_scale=metric.scale)
    ticks = sorted(data["n"].unique().tolist())
    if not along.curves:
        plot.xaxis.ticker, plot.xaxis.major_label_overrides = ticks, {n: length(n) for n in ticks}
    drawn = data[(data["status"] == "ok") & data["value"].notna()]
    if cut(drawn, metric):
        plot.y_range.start = metric.least
    parts = [(str(name), part.sort_values("n")) for name, part in drawn.groupby("series", sort=False)]
    _bands(plot, parts)
    styled = [(name, part, BASELINE if name == BEST else tone(part)) for name, part in parts]
    plot.multi_line("xs", "ys", color="color", line_width=1.6, alpha=0.9, hover_line_width=4, source=source({
        "xs": [floats(p["n"]) for _, p, _ in styled], "ys": [floats(p["value"]) for _, p, _ in styled], "color": [c for *_, c in styled],
        "series": [name for name, *_ in styled], "method": [str(p["method"].iloc[0]) for _, p, _ in styled],
    }))  # fmt: skip
    whole = columns(drawn, "n", "value", "low", "high", ran=drawn["ran"].astype(str).tolist())
    plot.segment("n", "low", "n", "high", color="color", line_width=1, alpha=0.25 if along.curves else 0.6, source=source(whole))
    spots = plot.scatter(
        "n", "value", size=4 if along.curves else 8, color="color", marker="marker", hover_line_color="black", source=source(whole)
    )
    word = "N" if along == Across() else along.label.partition(" (")[0].partition(",")[0]
    hover(
        plot,
        spots,
        ("method", "@series (@ran)"),
        (word, "@n{0.[00]}"),
        (metric.axis, "@value{0.0000a}"),
        ("range", "@low{0.000a} to @high{0.000a}"),
    )
    _failures(plot, data[data["status"] != "ok"], drawn, metric.scale)
    return plot


def _bands(plot: Any, parts: list[tuple[str, pd.DataFrame]]) -> None:
    noisy = [(name, part[part["floor"].notna()]) for name, part in parts if part["floor"].notna().any()]
    outlines = [(floats(p["n"]), *(floats(end) for end in band(p))) for _, p in noisy]
    if noisy:
        plot.patches("xs", "ys", color="#888888", alpha=0.25, source=source({
            "xs": [n + n[::-1] for n, _, _ in outlines], "ys": [up + down[::-1] for _, down, up in outlines],
            "series": [name for name, _ in noisy], "method": [str(p["method"].iloc[0]) for _, p in noisy],
        }))  # fmt: skip


def _failures(plot: Any, failed: pd.DataFrame, drawn: pd.DataFrame, scale: str) -> None:
    if failed.empty:
        return
    low, top = (float(drawn["value"].min()), float(drawn["value"].max())) if len(drawn) else (0.0, 1.0)
    rank = failed.groupby("n").cumcount()
    y = 1.6 * top * 1.12**rank if scale == "log" else top + max(top - low, 0.01) * (0.12 + 0.05 * rank)
    data = columns(failed, "n", why=[WORDS.get(s, s) for s in failed["status"]], y=floats(y))
    marks = plot.scatter("n", "y", size=9, marker="x", color="color", line_width=2, alpha=0.8, source=source(data))
    hover(plot, marks, ("method", "@series"), ("N", "@n{0}"), ("failed", "@why"))


def _points(data: pd.DataFrame) -> Any:
    """Fidelity against time: a point a configuration."""
    plot = figure("time per call (ms)", METRICS["rel_error"].axis)
    plot.xaxis.ticker.desired_num_ticks = 5
    data = data[(data["rel_error"] > 0) & (data["time_ms"] > 0)]
    more = [f"budget {b}" for b in data["budget"]] if "budget" in data else data["params"].tolist()
    spots = plot.scatter("time_ms", "rel_error", size=10, color="color", marker="marker", alpha=0.85, hover_line_color="black",
                         source=source(columns(data, "time_ms", "rel_error", more=more)))  # fmt: skip
    hover(plot, spots, ("method", "@series"), ("time", "@time_ms{0.000} ms"), ("error", "@rel_error{0.000e}"), ("parameters", "@more"))
    return plot


def _bars(data: pd.DataFrame) -> Any:
    """Shares of the stages of a call: a bar a method and length."""
    from bokeh.models import FactorRange, Legend

    data = data[data["status"] == "ok"]
    data = data.assign(method=[str(label).partition("@")[0] for label in data["label"]])
    data = data.assign(bar=[f"{s}, N={n}" for s, n in zip(data["series"], data["n"], strict=True)])
    bars = list(dict.fromkeys(data.sort_values("n", ascending=False, kind="stable")["bar"]))[:_BARS]
    data = data[data["bar"].isin(bars)]
    right = data.groupby("bar")["share"].cumsum()
    plot = figure("share of a call", "", x_scale="", y_scale="", y_range=FactorRange(factors=list(dict.fromkeys(data["bar"]))[::-1]))
    plot.height = 130 + 22 * len(bars)
    plot.add_layout(Legend(orientation="horizontal", ncols=5, label_text_font_size="8pt", border_line_color=None, padding=0), "below")
    values = columns(data, "share", "time_ms", "floor_ms", bar=data["bar"].tolist(), stage=data["stage"].tolist(), right=floats(right),
                       left=floats(right - data["share"]))  # fmt: skip
    values["color"] = ["#eeeeee" if stage == GAPS else colour(stage) for stage in data["stage"]]
    drawn = plot.hbar(y="bar", left="left", right="right", height=0.8, color="color", line_color="white", source=source(values),
                     legend_group="stage")  # fmt: skip
    hover(plot, drawn, ("method", "@bar"), ("stage", "@stage"), ("time", "@time_ms{0.0000} ms"), ("share", "@share{0.0%}"),
           ("roofline floor", "@floor_ms{0.0000} ms"))  # fmt: skip
    return plot


def legend() -> dict[str, str]:
    """Family -> its colour."""
    return {str(family): tone for family, tone in COLOURS.items() if family}
