"""Fidelity against time at one length: which methods no other beats in both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from attnbench import frame, series, stats
from attnbench.figures import _front, _panel
from attnbench.figures._place import Name, annotate
from attnbench.figures._style import WIDTHS, length, look, paper, variants, wrapped
from attnbench.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

NAME = "pareto"


def groups(table: pd.DataFrame) -> Iterator[series.Group]:
    """Each fidelity group with its own times, and each speed group with the fidelity group that shares most methods with it."""
    for _, rows in table.groupby("device", sort=True):
        accuracy = list(series.groups(rows[rows["task"] == "fidelity"]))
        yield from accuracy
        for group in series.groups(rows[rows["task"] == "speed"]):
            joined = [pd.concat([group.rows, other.rows]) for other in accuracy]
            best = max(joined, key=lambda both: len(data(both)), default=None)
            if best is not None and not data(best).empty:
                yield group._replace(rows=best)


def data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, one row a point: `panel` (input profile), `time_ms`, `rel_error`, `exact`, `front`.

    Times are forward times of the speed task where the table has any, else of the fidelity task itself; errors are medians over
    seeds. Rows meet at the largest length that both have, by method and parameters, and by implementation where the fidelity
    task pinned the same one.
    """
    if table.empty or not (table["status"] == "ok").any() or "rel_error" not in table:
        return pd.DataFrame()
    series.one_device(table)
    rows = frame.current(table)
    rows = rows[(rows["status"] == "ok") & (rows["replicate"] == 0) & (rows["mode"] == "forward")]
    errors, speed = rows[rows["rel_error"].notna()], rows[rows["task"] == "speed"]
    own = speed.empty
    if own:
        speed = errors.dropna(subset=["time_s"])
    common = set(errors["n"]) & set(speed["n"])
    if not common:
        return pd.DataFrame()
    n = max(common)
    points = _joined(errors[errors["n"] == n], speed[speed["n"] == n], own=own)
    return pd.DataFrame(_front.marked(points, ["panel"], _front.time_and_error)) if points else pd.DataFrame()


def _joined(errors: pd.DataFrame, speed: pd.DataFrame, *, own: bool) -> list[dict[str, Any]]:
    named = speed.assign(series=series.labels(speed)) if len(speed) else speed
    found: list[dict[str, Any]] = []
    for panel, part in errors.groupby("profile", sort=True):
        times = named[named["profile"] == panel] if own else named
        for _, rows in times.groupby("series", sort=True):
            first = rows.iloc[0]
            same = part[(part["method"] == first["method"]) & (part["params"] == first["params"])]
            pinned = same[same["label"] == first["label"]]
            same = same if pinned.empty else pinned
            if len(same):
                found.append({
                    "panel": str(panel), "family": str(series.family(first["method"]) or "other"), "series": first["series"],
                    "label": first["label"], "method": first["method"], "params": first["params"], "n": int(first["n"]),
                    "time_ms": stats.median(rows["time_s"].tolist()) * 1e3, "rel_error": stats.median(same["rel_error"].tolist()),
                    "exact": series.exact(first["method"]),
                })  # fmt: skip
    return found


def build(table: pd.DataFrame, columns: int = 2) -> Figure | None:
    """The figure, a panel for each input profile; None where no method has both a time and an error."""
    drawn = data(table)
    if drawn.empty or (~drawn["exact"]).sum() == 0:
        return None
    with paper():
        return _draw(drawn, table, columns)


def _draw(drawn: pd.DataFrame, table: pd.DataFrame, columns: int) -> Figure:
    panels = series.panel_order(drawn["panel"].unique())
    across = min(len(panels), columns)
    down = -(-len(panels) // across)
    points = [{str(k): v for k, v in row.items()} for row in drawn.to_dict("records")]
    number = variants(points)
    entries = {
        str(p["series"]): {**look(str(p["label"]), number[str(p["series"])]), "linestyle": "none"} for p in sorted(points, key=_order)
    }
    width, caption = WIDTHS[columns], wrapped(_caption(drawn, table), WIDTHS[columns])
    lines = -(-len(entries) // _panel.legend_columns(list(entries), width))
    sizes = [0.125 * lines + 0.06, *[1.9 if columns > 1 else 1.25, 0.2] * down]
    figure = Figure(
        figsize=(width, sum(sizes) + 0.2 * down + 0.45 + 0.115 * (caption.count("\n") + 1)),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.015, hspace=0.0, wspace=0.02),
    )
    grid = GridSpec(len(sizes), across, figure=figure, height_ratios=sizes)
    _panel.legend(figure.add_subplot(grid[0, :]), "", list(entries.items()), width)
    placed: list[tuple[Axes, Axes, pd.DataFrame]] = []
    for i, panel in enumerate(panels):
        leaders = placed[0][:2] if placed else (None, None)
        main = figure.add_subplot(grid[1 + 2 * (i // across), i % across], sharex=leaders[0], sharey=leaders[0])
        strip = figure.add_subplot(grid[2 + 2 * (i // across), i % across], sharex=main, sharey=leaders[1])
        part = drawn[drawn["panel"] == panel]
        _panel_of(main, strip, part, entries)
        main.set_title(panel, pad=3, fontweight="bold")
        main.tick_params(labelbottom=False, labelleft=i % across == 0)
        strip.tick_params(labelleft=i % across == 0)
        strip.set_xlabel("time per call (ms)" if i // across == down - 1 else "")
        placed.append((main, strip, part))
    figure.supylabel(METRICS["rel_error"].axis, fontsize=7)
    figure.supxlabel(caption, fontsize=5.5, color="#444444", x=0.01, ha="left", linespacing=1.25)
    _limits(placed[0][0], drawn)
    for main, strip, _ in placed:
        _panel.plain(main.yaxis)
        _panel.plain(strip.xaxis)
    figure.draw_without_rendering()
    for main, strip, part in placed:
        _name(main, strip, part, entries)
    return figure


def _order(point: dict[str, Any]) -> tuple[Any, ...]:
    return (series.family_rank(point["family"]), series.natural(str(point["series"])))


def _limits(axes: Axes, drawn: pd.DataFrame) -> None:
    errors = drawn.loc[~drawn["exact"] & (drawn["rel_error"] > 0), "rel_error"]
    axes.set(xscale="log", yscale="log")
    low, high = drawn["time_ms"].min(), drawn["time_ms"].max()
    room = 1.3 * (high / low) ** 0.15
    axes.set_xlim(low / room, high * room)
    if len(errors):
        axes.set_ylim(errors.min() / 1.6, errors.max() * 2.5)


def _panel_of(main: Axes, strip: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]]) -> None:
    """Approximate methods above, exact ones in a strip below, and the front through both."""
    any_exact = bool(part["exact"].any())
    strip.set(ylim=(-1, 1), yticks=[0], yticklabels=["exact" if any_exact else ""])
    strip.tick_params(left=False)
    main.tick_params(bottom=False)
    main.spines["bottom"].set_visible(False)
    strip.set_facecolor("#f4f4f4" if any_exact else "none")
    for point in part.to_dict("records"):
        axes, y = (strip, 0.0) if point["exact"] else (main, point["rel_error"])
        axes.plot([point["time_ms"]], [y], **entries[str(point["series"])], zorder=3, clip_on=False)
    path = _staircase(part)
    if path:
        main.plot(*zip(*path, strict=True), color="#555555", linewidth=0.8, zorder=2)
        if part["front"][part["exact"]].any():
            strip.plot([path[-1][0]] * 2, [0, 1], color="#555555", linewidth=0.8, zorder=2)


def _staircase(part: pd.DataFrame) -> list[tuple[float, float]]:
    """Corners of the front among approximate methods, down to the axis where an exact method ends it; empty without any."""
    front = part[part["front"]].sort_values("time_ms")
    exact, approximate = front[front["exact"]], front[~front["exact"]]
    corners = list(zip(approximate["time_ms"].tolist(), approximate["rel_error"].tolist(), strict=True))
    path = _front.stairs(corners)
    if path and len(exact):
        end = float(exact["time_ms"].min())
        path += [(end, path[-1][1]), (end, path[-1][1] * 1e-6)]
    return path


def _name(main: Axes, strip: Axes, part: pd.DataFrame, entries: dict[str, dict[str, Any]]) -> None:
    """Write names beside the points: of all approximate ones where they are few, else of the front."""
    path = _staircase(part)
    for axes, exact in ((main, False), (strip, True)):
        rows = part[part["exact"] == exact].sort_values("time_ms").to_dict("records")
        spots = [(float(r["time_ms"]), 0.0 if exact else float(r["rel_error"])) for r in rows]
        few = len(rows) <= _front.FEW and not exact
        names = [
            Name(str(r["series"]), spot, bool(r["front"]), entries[str(r["series"])]["color"])
            for r, spot in zip(rows, spots, strict=True)
            if r["front"] or few
        ]
        annotate(axes, names, spots, [] if exact else [path])


def _caption(drawn: pd.DataFrame, table: pd.DataFrame) -> str:
    speed, accuracy = table[table["task"] == "speed"], table[table["task"] == "fidelity"]
    n = int(drawn["n"].iloc[0])
    here = f"N={length(n)}, forward. "
    if speed.empty:
        text = f"{here}Time and error: {series.describe(accuracy)}."
    else:
        text = f"{here}Time: {series.describe(speed)}. Error: {series.describe(accuracy)}."
    text += " Line and bold names: Pareto front, what nothing else beats in both time and error"
    text += "; exact methods count as equally accurate." if drawn["exact"].any() else "."
    text += f" {series.settings(speed if len(speed) else accuracy)}".rstrip()
    return text + _left_out(drawn, speed if len(speed) else accuracy, accuracy, n)


def _left_out(drawn: pd.DataFrame, timed: pd.DataFrame, accuracy: pd.DataFrame, n: int) -> str:
    """Who is missing from the picture, and why."""
    rows = timed[(timed["n"] == n) & (timed["mode"] == "forward") & (timed["replicate"] == 0)]
    rows = rows.assign(series=series.labels(rows)) if len(rows) else rows
    # by what was run: a series is called otherwise where others of its method are in the picture
    shown = set(zip(drawn["label"], drawn["params"], strict=True))
    missing = [key not in shown for key in zip(rows["label"], rows["params"], strict=True)]
    absent = dict(list(rows[missing].groupby("series"))) if any(missing) else {}
    failed = [f"{name!s} ({part['status'].iloc[0]})" for name, part in absent.items() if (part["status"] != "ok").any()]
    good = {str(name): part for name, part in absent.items() if (part["status"] == "ok").all()}
    untimed = [name for name, part in good.items() if part["time_s"].isna().all()]
    unmatched = [name for name in good if name not in untimed]
    text = f" Failed here: {'; '.join(failed)}." if failed else ""
    text += f" Without a time: {'; '.join(untimed)}." if untimed else ""
    return text + (f" Without a fidelity record of the same parameters: {'; '.join(unmatched)}." if unmatched and len(accuracy) else "")
