"""Looks of figures: markers and colours are stable, names keep clear of points, and axes have ticks."""

import itertools

import pandas as pd
import pytest
from matplotlib.figure import Figure

from attnbench import registry
from attnbench.figures import _style
from attnbench.figures._place import Name, annotate


def test_markers_depend_on_the_name_alone_and_differ_within_a_family():
    assert _style.marker("softmax") == "o"
    methods = registry.registry().found.values()
    for _, group in itertools.groupby(sorted(methods, key=lambda m: m.family), key=lambda m: m.family):
        names = [m.name for m in group]
        assert len({str(_style.marker(n)) for n in names}) == len(names), names
    assert len(set(_style.COLOURS.values())) == len(_style.COLOURS)


def test_implementations_share_marker_and_colour_and_differ_otherwise():
    looks = [_style.look(label) for label in ("softmax", "softmax@cudnn", "softmax@flash", "softmax@efficient", "softmax@math")]
    assert len({(str(x["marker"]), x["color"]) for x in looks}) == 1
    assert len({x["fillstyle"] for x in looks}) == len(looks)
    assert _style.look("nobody@knows")["color"].upper() == _style.COLOURS[None]


def test_names_keep_clear_of_points_and_of_each_other():

    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot()
    points = [(0.5 + 0.02 * i, 0.5 + 0.01 * i) for i in range(6)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    annotate(axes, [Name(f"point {i}", p, bool(i % 2), "k") for i, p in enumerate(points)], points)
    figure.draw_without_rendering()
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(t) for t in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(p)) for box in boxes for p in points)


def test_wide_names_do_not_touch():
    from matplotlib.text import Text

    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    points = [(0.40, 0.5), (0.43, 0.5), (0.47, 0.5)]
    annotate(axes, [Name(text, p, True, "k") for text, p in zip(("MMMM", "MWMW", "MoBA"), points, strict=True)], points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(t).padded(figure.dpi / 72 * 0.5) for t in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_names_stay_within_the_axes_and_off_strokes():
    from matplotlib.text import Text

    figure = Figure(figsize=(2, 2), dpi=300)  # with few pixels letters are wider than their outlines
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    points = [(0.3, 0.5), (0.7, 0.2), (0.35, 0.97)]
    strokes = [[(0.3, 0.4), (0.3, 0.65)]]
    annotate(axes, [Name("a name that takes most of a width", p, False, "k") for p in points], points, strokes)
    figure.draw_without_rendering()
    window, boxes = axes.get_window_extent(), [Text.get_window_extent(t) for t in axes.texts]
    assert all(window.x0 <= b.x0 and b.x1 <= window.x1 and window.y0 <= b.y0 and b.y1 <= window.y1 for b in boxes)
    lines = [axes.transData.transform(line) for line in strokes]
    assert not any(b.x0 < x < b.x1 and b.y1 > low and b.y0 < high for b in boxes for (x, low), (_, high) in lines)


def test_lines_to_names_cross_neither_points_nor_names():
    from attnbench.figures._place import _away, _cost, _crosses

    point, name, beside, window = (10.0, 10.0), (40.0, 6.0, 60.0, 14.0), (40.0, 40.0, 60.0, 48.0), (0.0, 0.0, 100.0, 100.0)
    between = (20.0, 7.0, 26.0, 13.0)
    own = (7.0, 7.0, 13.0, 13.0)
    assert _away(name, point)
    assert _crosses(point, name, between)
    assert not _crosses(point, beside, between)
    assert not _crosses(point, name, own), "every line begins at its point"
    assert _cost(name, [own, between], window, point) > _cost(beside, [own, between], window, point)
    assert _cost(name, [own], window, point) < _cost(beside, [own], window, point)


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0.7, 1.2, ["0.7", "0.8", "0.9", "1"]), (0.7, 6, ["1", "2", "5"]), (0.7, 200, ["1", "10", "100"])]
)
def test_narrow_axes_have_ticks(low, high, ticks):

    from attnbench.figures import _panel

    axes = Figure().add_subplot(xscale="log", xlim=(low, high))
    _panel.plain(axes.xaxis)
    shown = axes.xaxis.get_majorticklocs()
    assert [axes.xaxis.get_major_formatter()(v) for v in shown if low <= v <= high] == ticks


def test_a_linear_axis_shows_a_guess_and_magnifies_no_small_difference():
    from attnbench.figures import _panel
    from attnbench.metrics import METRICS

    drawn = pd.DataFrame({"value": [0.0, 1e-4], "low": [0.0, 0.0], "high": [1e-4, 1e-4], "chance": [0.1, None]})
    low, high = _panel.span(drawn, METRICS["accuracy"])
    assert -0.01 < low < 0
    assert 0.1 < high < 0.11
    low, high = _panel.span(drawn.drop(columns="chance"), METRICS["accuracy"])
    assert (low, high) == pytest.approx((-0.001, 0.021))


@pytest.mark.parametrize(("n", "text"), [(196, "196"), (784, "784"), (1024, "1k"), (3136, "3136"), (262144, "256k"), (2**20, "1M")])
def test_ticks(n, text):
    assert _style.length(n) == text
