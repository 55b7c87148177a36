"""Figures: what is drawn, where failures stand, and that files are stable. Pixels are not compared."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import synthetic
from disk_support import file_size_limit
from figures_support import axes_with_lines, captioned

from attnbench import figures, frame, series, stats
from attnbench.errors import UserError
from attnbench.figures import _interactive, _panel, _style, latency, pareto
from attnbench.metrics import METRICS

LENGTHS = (1024, 32768, 131072)
FEW = ("softmax@cudnn", "softmax@math", "mita", "topk", "linear")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    synthetic.write(folder, "speed", synthetic.speed(LENGTHS))
    synthetic.write(folder, "few", [r for r in synthetic.speed(LENGTHS) if r.case.label in FEW])
    return frame.load(synthetic.write(folder, "fidelity", synthetic.fidelity((1024, 32768))))[0]


@pytest.fixture(scope="module")
def many(loaded):
    return loaded[loaded["suite"] == "speed"]


@pytest.fixture(scope="module")
def few(loaded):
    return loaded[loaded["suite"] == "few"]


def test_every_module_keeps_the_contract():
    found = figures.modules()
    assert set(found) >= {"latency", "throughput", "memory", "fidelity", "pareto", "efficiency"}
    for name, module in found.items():
        assert module.__name__ == f"attnbench.figures.{name}"
        assert module.build(pd.DataFrame()) is None
        assert module.data(pd.DataFrame()).empty


def test_latency_draws_the_medians_of_what_was_measured(few):
    drawn = latency.data(few)
    good = few[(few["status"] == "ok") & (few["replicate"] == 0)]
    assert len(drawn[drawn["status"] == "ok"]) == len(good)
    for row in good.to_dict("records"):
        match = drawn[(drawn["label"] == row["label"]) & (drawn["n"] == row["n"]) & (drawn["panel"] == row["mode"])]
        assert match["value"].tolist() == pytest.approx([row["time_s"] * 1e3])
        assert match["low"].iloc[0] <= match["value"].iloc[0] <= match["high"].iloc[0]


def test_drawn_lines_are_the_data(few):
    figure = latency.build(few)
    drawn = latency.data(few)
    assert figure is not None
    for axes, panel in zip(axes_with_lines(figure), ("forward", "forward+backward"), strict=True):
        points = {tuple(xy) for line in axes.lines for xy in line.get_xydata()}
        ok = drawn[(drawn["panel"] == panel) & (drawn["status"] == "ok")]
        assert points == set(zip(ok["n"].astype(float), ok["value"], strict=True))


def test_failures_stand_at_their_length_with_their_letter(few):
    figure = latency.build(few)
    assert figure is not None
    texts = {(t.get_position()[0], t.get_text()) for a in figure.axes for t in a.texts}
    assert texts == {(32768, "O"), (131072, "S"), (131072, "T")}
    assert all(status in _style.LETTERS for status in latency.data(few)["status"].unique() if status != "ok")


def test_many_series_become_panels_by_family_with_the_best_dense_time(many, few):
    drawn = latency.data(many)
    base = drawn[drawn["kind"] == "baseline"]
    dense = drawn[(drawn["family"] == "dense softmax") & (drawn["kind"] == "series") & (drawn["status"] == "ok")]
    expected = dense.groupby(["panel", "n"])["value"].min()
    assert base.set_index(["panel", "n"])["value"].sort_index().tolist() == expected.sort_index().tolist()
    figure = latency.build(many)
    assert figure is not None
    assert len(axes_with_lines(figure)) == 2 * drawn["family"].nunique()
    assert (latency.data(few)["kind"] == "series").all()


def test_families_of_two_panels_each_stand_side_by_side_on_one_page(many):
    wide, narrow = latency.build(many, columns=2), latency.build(many, columns=1)
    assert wide is not None
    assert narrow is not None
    assert wide.get_figheight() < 9.0 < narrow.get_figheight()
    wide.draw_without_rendering()
    titled = [a for a in wide.axes if (legend := a.get_legend()) and legend.get_title().get_text()]
    families = [a.get_legend().get_title().get_text() for a in titled]
    boxes = [a.get_position() for a in titled]
    assert families[:2] == ["dense softmax", "kernelised"]
    assert boxes[0].y0 == pytest.approx(boxes[1].y0)
    assert boxes[0].x1 <= boxes[1].x0
    assert boxes[2].y1 <= boxes[0].y0
    for axes in titled:
        legend, own = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert legend.width <= own.width, axes.get_legend().get_title().get_text()
    labelled = [a for a in axes_with_lines(wide) if a.get_xlabel()]
    assert len(labelled) == 4, "the last panel of each column names what it runs along"


def test_a_figure_too_tall_for_a_column_is_drawn_over_two(many, few):
    def shape(table):
        return {one.module.NAME: (one.columns, one.figure.get_figheight() / one.figure.get_figwidth()) for one in figures.drawn(table, 1)}

    assert {columns for columns, _ in shape(few).values()} == {1}
    crowded = shape(many)
    assert crowded["latency"][0] == 2
    assert crowded["latency"][1] < figures.TALL


def test_noise_band_covers_the_series_measured_twice(few):
    drawn = latency.data(few)
    assert set(drawn.loc[drawn["floor"].notna(), "label"]) == {"softmax@cudnn"}
    one = drawn[drawn["floor"].notna()].iloc[0]
    noise = stats.floor(series.pairs(few, "forward"), one["value"] / 1e3)
    assert noise is not None
    assert one["floor"] == noise.relative
    figure = latency.build(few)
    assert figure is not None
    assert series.noise(few) in captioned(figure)


def test_environments_are_told_apart_by_what_differs(few):
    plain = series.describe(few)
    assert "environment" not in plain
    others = {"a": {"threads": 2}, "b": {"threads": 3}, "c": {"driver": "1", "os": "x", "threads": 3, "torch": "9"}}
    facts = dict(few["facts"].iloc[0])
    for names, words in (("a", ""), ("ab", " (different threads)"), ("abc", " (different driver/os/threads and 1 more)")):
        ids = [names[i % len(names)] for i in range(len(few))]
        moved = few.assign(env_id=ids, facts=[tuple({**facts, **others[i]}.items()) for i in ids])
        assert series.describe(moved) == plain + (f", {len(names)} environments{words}" if words else "")


def test_noise_band_of_a_page_is_that_of_a_figure_and_never_below_zero(few):
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    drawn = latency.data(few).assign(floor=lambda table: 5 * table["floor"].clip(lower=0.4))
    plot = _interactive._lines(drawn, _panel.Across(), METRICS["latency"])
    (outlines,) = [r.data_source.data["ys"] for r in plot.renderers if type(r.glyph).__name__ == "Patches"]
    noisy = drawn[drawn["floor"].notna()].sort_values("n")
    wide = 1 + noisy["floor"]
    (outline,) = outlines
    assert outline == pytest.approx([*(noisy["value"] * wide), *(noisy["value"] / wide)[::-1]], rel=1e-4)


@pytest.mark.parametrize(("name", "metric"), [("throughput", "throughput"), ("memory", "peak_memory"), ("efficiency", "efficiency")])
def test_other_metrics_are_in_the_units_of_their_axis(few, name, metric):
    drawn = figures.modules()[name].data(few)
    one = drawn[(drawn["label"] == "linear") & (drawn["n"] == 1024) & (drawn["panel"] == "forward")].iloc[0]
    row = few[(few["label"] == "linear") & (few["n"] == 1024) & (few["mode"] == "forward")]
    assert one["value"] == pytest.approx(METRICS[metric].at(row, row["time_s"]).iloc[0] / METRICS[metric].divide)
    assert one["low"] <= one["value"] <= one["high"]


def test_exact_methods_are_summed_up_in_the_fidelity_caption(loaded):
    rows = loaded[loaded["task"] == "fidelity"]
    drawn = figures.modules()["fidelity"].data(rows)
    assert set(drawn.loc[drawn["kind"] == "exact", "method"]) == {"softmax", "flash_attn"}
    assert set(drawn["panel"]) == set(synthetic.PROFILES)
    figure = figures.modules()["fidelity"].build(rows)
    assert figure is not None
    assert "exact methods (FlashAttention, Softmax)" in captioned(figure)


def test_mixed_conditions_are_refused(loaded):
    with pytest.raises(ValueError, match="mixes"):
        latency.build(loaded)


def test_pareto_front_is_what_nothing_beats(loaded):
    drawn = pareto.data(loaded[loaded["suite"] != "few"])
    assert set(drawn["n"]) == {32768}
    for _, panel in drawn.groupby("panel"):
        points = [(p["time_ms"], 0 if p["exact"] else p["rel_error"], p["front"]) for p in panel.to_dict("records")]
        for time, error, front in points:
            beaten = any(t <= time and e <= error and (t, e) != (time, error) for t, e, _ in points)
            assert front == (not beaten)


def test_pareto_joins_speed_and_fidelity_by_method_and_parameters(loaded):
    drawn = pareto.data(loaded[loaded["suite"] != "few"])
    mita = drawn[(drawn["method"] == "mita") & (drawn["panel"] == "randn")]
    assert len(mita) == 1
    time = loaded[(loaded["suite"] == "speed") & (loaded["method"] == "mita") & (loaded["n"] == 32768) & (loaded["mode"] == "forward")][
        "time_s"
    ]
    assert mita["time_ms"].tolist() == pytest.approx((time * 1e3).tolist())
    own = pareto.data(loaded[loaded["task"] == "fidelity"])
    assert (own["method"] == "mita").sum() == 4 * len(synthetic.PROFILES)


def test_pareto_names_who_is_missing(loaded):
    figure = pareto.build(loaded[loaded["suite"] != "few"])
    assert figure is not None
    caption = captioned(figure)
    assert "Failed here: Softmax (math) (oom)" in caption
    assert "same parameters: Sliding window; xFormers" in caption


def test_of_one_length_a_row_a_series_is_drawn(many):
    rows = many[many["n"] == LENGTHS[-1]]
    drawn, figure = latency.data(rows), latency.build(rows)
    assert figure is not None
    own = drawn[drawn["kind"] == "series"]
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert sorted(names) == sorted(own["series"].unique())
    for axes, panel in zip(figure.axes, ("forward", "forward+backward"), strict=True):
        assert axes.get_title() == panel
        part = own[own["panel"] == panel]
        good = part[part["status"] == "ok"]
        points = {(float(x), names[round(y)]) for line in axes.lines for x, y in line.get_xydata() if line.get_marker() != "None"}
        assert points == set(zip(good["value"], good["series"], strict=True))
        failed = {(names[round(t.get_position()[1])], t.get_text()) for t in axes.texts}
        assert failed == {(r["series"], _style.LETTERS[r["status"]]) for r in part[part["status"] != "ok"].to_dict("records")}
        assert failed, "some cells of this length failed"
        best = drawn.loc[(drawn["kind"] == "baseline") & (drawn["panel"] == panel), "value"].item()
        assert any(set(line.get_xdata()) == {best} and line.get_color() == _style.BASELINE for line in axes.lines)
    assert "Letters: T timed out" in captioned(figure)


def test_shares_of_the_roofline_above_one_are_explained(few):
    from attnbench.figures import efficiency

    figure = efficiency.build(few.assign(copy_bytes_per_s=few["copy_bytes_per_s"] / 1e6))
    plain = efficiency.build(few)
    assert figure is not None
    assert plain is not None
    assert efficiency.data(few)["value"].max() < 1
    assert "Above 1:" in figure.get_supxlabel()
    assert "Above 1:" not in plain.get_supxlabel()


def test_draw_all_writes_stable_files_and_the_data(few, tmp_path):
    first, second = (figures.draw_all(few, tmp_path / name) for name in "ab")
    names = {p.name for p in first}
    assert {f"few-latency-test-gpu-80gb{s}" for s in (".pdf", ".png", ".csv")} <= names
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    csv = pd.read_csv(tmp_path / "a" / "few-latency-test-gpu-80gb.csv")
    drawn = latency.data(few)
    np.testing.assert_allclose(csv["value"], drawn["value"], rtol=1e-6, err_msg="numbers are written to seven digits")
    pdf = (tmp_path / "a" / "few-latency-test-gpu-80gb.pdf").read_bytes()
    assert b"/Type0" in pdf or b"/TrueType" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf


def test_a_full_disk_leaves_older_figures_as_they_were(few, tmp_path):
    figure, data, stem = latency.build(few), latency.data(few), tmp_path / "one"
    paths = figures.write(figure, data, stem)
    before = [path.read_bytes() for path in paths]
    for suffix in figures.SUFFIXES:
        with file_size_limit(100), pytest.raises(UserError, match=r"cannot write to .*: File too large"):
            figures.write(figure, data, stem, (suffix,))
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_users_own_settings_change_nothing(few):
    figure = latency.build(few)
    with mpl.rc_context({"font.size": 30, "axes.labelsize": 30}):
        other = latency.build(few)
    assert figure is not None
    assert other is not None
    assert [a.xaxis.label.get_size() for a in figure.axes] == [a.xaxis.label.get_size() for a in other.axes]
