"""A metric at one sequence length as a plot to zoom into: a row a method, the best at the top, with its number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from attnbench.figures._bokeh import columns, figure, floats, hover, source
from attnbench.figures._multiples import BASELINE
from attnbench.figures._ranked import number
from attnbench.figures._style import WORDS

if TYPE_CHECKING:
    from attnbench.metrics import Metric


def dots(data: pd.DataFrame, metric: Metric) -> Any:
    """Rows of `attnbench.figures._facets.Facets.data` of one panel and one length; what failed stands last, with a cross at the edge."""
    from bokeh.models import FactorRange, LabelSet

    data = data[~data["series"].eq(BASELINE)].sort_values("value", ascending=metric.better == "lower", na_position="last", kind="stable")
    good, failed = data[data["status"] == "ok"], data[data["status"] != "ok"]
    ends, log = _ends(good, metric)
    rows = list(dict.fromkeys(data["series"].astype(str)))
    plot = figure(metric.axis, "", x_scale="log" if log else "linear", y_scale="", x_range=ends, y_range=FactorRange(factors=rows[::-1]))
    plot.height = 110 + 20 * len(rows)
    told = [number(v) for v in good["value"]]
    drawn = source(columns(good, "value", "low", "high", bar=good["series"].tolist(), told=told, n=floats(good["n"]),
                           ran=good["ran"].astype(str).tolist()))  # fmt: skip
    plot.segment("low", "bar", "high", "bar", color="color", line_width=2, alpha=0.6, source=drawn)
    spots = plot.scatter("value", "bar", size=9, color="color", marker="marker", hover_line_color="black", source=drawn)
    plot.add_layout(LabelSet(x="value", y="bar", text="told", x_offset=8, y_offset=-6, text_font_size="8pt", source=drawn))
    hover(plot, spots, ("method", "@series (@ran)"), ("N", "@n{0}"), (metric.axis, "@value{0.0000a}"),
          ("range", "@low{0.000a} to @high{0.000a}"))  # fmt: skip
    if len(failed):
        edge = columns(failed, bar=failed["series"].tolist(), x=[ends[0] * 1.05 if log else ends[0]] * len(failed),
                       why=[WORDS.get(s, s) for s in failed["status"]])  # fmt: skip
        marks = plot.scatter("x", "bar", size=9, marker="x", color="color", line_width=2, source=source(edge))
        hover(plot, marks, ("method", "@series"), ("failed", "@why"))
    return plot


def _ends(good: pd.DataFrame, metric: Metric) -> tuple[tuple[float, float], bool]:
    """Ends of the value axis, with room for numbers at the right, and whether it is logarithmic."""
    values = pd.concat([good[c] for c in ("value", "low", "high")]).dropna()
    if values.empty:
        return (0.1, 1.0), metric.scale == "log"
    low, high = float(values.min()), float(values.max())
    if metric.scale == "log" and low > 0:
        return (low / 1.3, high * 1.3 * (high / low) ** 0.15), True
    reach = high - low or 1.0
    return (low - 0.05 * reach, high + 0.2 * reach), False
