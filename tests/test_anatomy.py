"""The figure of where time goes: the data that is drawn, bars that add up, floors, gaps, and looks that stay."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
import synthetic
from figures_support import captioned
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from attnbench import figures, frame
from attnbench.figures import _stages, anatomy
from attnbench.record import Breakdown
from attnbench.stages import GRADIENT, STAGES, rank

LENGTHS = (1024, 4096)
FLOPS_PER_S, BYTES_PER_S = 7e14, 2.6e12
WHOLE_S = 1e-3
PARTS = {
    "mita": {"pool": 1e-4, "probe": 2e-4, "attend": 3e-4, "attend gradient": 1e-4},
    "topk": {"score": 5e-4, "select": 9e-4, "other": 1e-4},  # more than the timed call
    "softmax@flash": {"attend": 9e-4},
}


def apart(stages: dict[str, float], waits: int | None = 0) -> Breakdown:
    flops, moved = {"attend": 7 * 10**10, "pool": 10**6}, {"attend": 26 * 10**6, "pool": 26 * 10**7}
    return Breakdown(stages, sum(stages.values()), 12, 9, waits, 10, "kernels, copies and fills on the device", flops, moved)


def record(label: str, n: int, mode: str = "forward", waits: int | None = 0, **rest):
    params = {"mita": {"landmarks": 64, "topk": 64}, "topk": {"topk": 64}}.get(label, {})
    return synthetic.ok(synthetic.case(label, params, n=n, mode=mode, **rest), WHOLE_S, spread=0, breakdown=apart(PARTS[label], waits))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    modes = ("forward", "forward+backward")
    records = [record(label, n, mode) for label, n, mode in itertools.product(PARTS, LENGTHS, modes)]
    records += [synthetic.ok(synthetic.case("linear"), WHOLE_S), synthetic.failed(synthetic.case("agent"), "oom")]
    records.append(record("softmax@flash", 1024, replicate=1))
    return frame.load(synthetic.write(tmp_path_factory.mktemp("results"), "speed", records))[0]


@pytest.fixture(scope="module")
def forward(loaded):
    return next(g.rows for g in anatomy.groups(loaded) if set(g.rows["mode"]) == {"forward"})


def test_only_what_was_taken_apart_is_drawn_and_modes_are_kept_apart(loaded):
    groups = list(anatomy.groups(loaded))
    assert [g.place for g in groups] == ["test-gpu-80gb-forward", "test-gpu-80gb-forward-backward"]
    for group in groups:
        drawn = anatomy.data(group.rows)
        assert set(drawn["label"]) == set(PARTS)
        assert len(drawn) == len(LENGTHS) * sum(len(stages) + 1 for stages in PARTS.values())
    with pytest.raises(ValueError, match="mixes"):
        anatomy.build(loaded)
    assert anatomy.data(loaded[loaded["label"] == "linear"]).empty
    assert anatomy.build(loaded.drop(columns="breakdown")) is None


def test_times_are_those_of_the_record_and_gaps_are_what_is_left(forward):
    drawn = anatomy.data(forward)
    for (label, _), cell in drawn.groupby(["label", "n"]):
        times = dict(zip(cell["stage"], cell["time_ms"], strict=True))
        gap = times.pop(_stages.GAPS)
        assert times == pytest.approx({s: t * 1e3 for s, t in PARTS[label].items()})
        assert list(times) == sorted(times, key=rank)
        assert gap == pytest.approx(WHOLE_S * 1e3 - sum(times.values()))
        assert (cell["whole_ms"] == WHOLE_S * 1e3).all()
        assert cell["share"].sum() == pytest.approx(1.0)
        assert (cell["share"] >= 0).all()
    over = drawn[(drawn["label"] == "topk") & (drawn["stage"] == "select")].iloc[0]
    assert over["share"] == pytest.approx(9 / 15), "of the sum, where it is more than the timed call"


def test_floors_are_the_larger_of_work_and_traffic(forward):
    drawn = anatomy.data(forward)
    one = drawn[(drawn["label"] == "mita") & (drawn["n"] == 1024)].set_index("stage")
    assert one.loc["attend", "floor_ms"] == pytest.approx(7e10 / FLOPS_PER_S * 1e3)
    assert one.loc["pool", "floor_ms"] == pytest.approx(26e7 / BYTES_PER_S * 1e3)
    assert one.loc["pool", "floor_share"] == pytest.approx(one.loc["pool", "floor_ms"] / (WHOLE_S * 1e3))
    assert math.isnan(one.loc["probe", "floor_ms"]), "nothing was counted for it"
    assert math.isnan(one.loc[_stages.GAPS, "floor_ms"])
    blind = anatomy.data(forward.assign(matmul_flops_per_s=None))
    assert blind["floor_ms"].isna().all()


def bars(axes):
    """(place, bottom, height, colour, hatch) of each segment."""
    found = [(p.get_x() + p.get_width() / 2, p.get_y(), p.get_height(), p.get_facecolor(), p.get_hatch()) for p in axes.patches]
    return [(round(x), y, height, to_hex(colour), hatch) for x, y, height, colour, hatch in found]


def test_drawn_bars_and_lines_are_the_data(forward):
    figure, drawn = anatomy.build(forward), anatomy.data(forward)
    assert figure is not None
    panels = {a.get_title().split("\n")[0]: a for a in figure.axes if a.get_title()}
    assert list(panels) == ["Softmax (flash)", "Top-k", "MiTA"]
    for name, axes in panels.items():
        rows = drawn[drawn["series"] == name]
        found = bars(axes)
        assert [height for _, _, height, _, _ in found] == pytest.approx(rows["share"].tolist())
        assert [x for x, *_ in found] == [LENGTHS.index(n) for n in rows["n"]]
        for x in range(len(LENGTHS)):
            stack = [(y, h) for at, y, h, _, _ in found if at == x]
            assert all(y + h == pytest.approx(after) for (y, h), (after, _) in itertools.pairwise(stack))
            assert sum(h for _, h in stack) == pytest.approx(1.0)
        colours = [to_hex(_stages.fill(s)["facecolor"]) for s in rows["stage"]]
        assert [c for *_, c, _ in found] == colours
        assert [hatch is not None for *_, hatch in found] == (rows["stage"] == _stages.GAPS).tolist()
    below = figure.axes[figure.axes.index(panels["MiTA"]) + 1]
    stages = [line for line in below.lines if line.get_color() != "black"]
    mita = drawn[(drawn["series"] == "MiTA") & (drawn["stage"] != _stages.GAPS)]
    assert [list(line.get_ydata()) for line in stages] == [g["time_ms"].tolist() for _, g in mita.groupby("stage", sort=False)]


def test_a_floor_is_marked_inside_its_segment(forward):
    figure = anatomy.build(forward)
    assert figure is not None
    axes = next(a for a in figure.axes if a.get_title().startswith("MiTA"))
    marks = sorted(line.get_ydata()[0] for line in axes.lines if min(line.get_xdata()) == -0.4)
    assert marks == pytest.approx([0.1, 0.1 + 0.2 + 0.1]), "pool's floor is the whole segment, attend's a third of its own"


def test_titles_count_launches_and_captions_say_what_is_drawn(loaded, forward, tmp_path):
    figure = anatomy.build(forward)
    assert figure is not None
    assert next(a for a in figure.axes if a.get_title().startswith("MiTA")).get_title() == "MiTA\n12 launches, 0 waits"
    caption = captioned(figure)
    for part in ("Test GPU 80GB", "forward. ", "kernels, copies and fills on the device", "MiTA: landmarks=64, topk=64", "of their sum"):
        assert part in caption
    cpu = frame.load(synthetic.write(tmp_path, "s", [record("softmax@flash", 1024, waits=None)]))[0]
    one = anatomy.build(cpu)
    assert one is not None
    assert any(a.get_title().endswith("12 operators") for a in one.axes)
    assert "of their sum" not in one.get_supxlabel()


def test_every_stage_has_a_colour_of_its_own_and_a_gradient_a_lighter_one():
    assert set(_stages.COLOURS) == set(STAGES)
    every = [*STAGES, *(s + GRADIENT for s in STAGES)]
    assert len({_stages.colour(s).lower() for s in every}) == len(every)
    for stage in STAGES:
        assert sum(int(_stages.colour(stage + GRADIENT)[i : i + 2], 16) for i in (1, 3, 5)) > sum(
            int(_stages.colour(stage)[i : i + 2], 16) for i in (1, 3, 5)
        )


def test_it_is_drawn_with_the_others_and_its_data_beside_it(loaded, tmp_path):
    written = {p.name for p in figures.draw_all(loaded, tmp_path)}
    for mode in ("forward", "forward-backward"):
        assert {f"speed-anatomy-test-gpu-80gb-{mode}{suffix}" for suffix in (".pdf", ".png", ".csv")} <= written
    csv = pd.read_csv(tmp_path / "speed-anatomy-test-gpu-80gb-forward.csv")
    assert csv["time_ms"].tolist() == pytest.approx(anatomy.data(next(iter(anatomy.groups(loaded))).rows)["time_ms"].tolist())
    assert {"stage", "share", "floor_ms", "whole_ms", "launches", "kernels", "synchronisations"} <= set(csv.columns)


def panel(figure, name):
    return next(a for a in figure.axes if a.get_title().startswith(name))


def test_every_length_that_any_method_was_taken_apart_at_is_drawn_and_what_lacks_says_why(tmp_path):
    records = [record("mita", n) for n in (1024, 4096, 16384)] + [record("softmax@flash", 1024), record("topk", 1024)]
    records += [synthetic.failed(synthetic.case("softmax@flash", n=n), s) for n, s in ((4096, "oom"), (16384, "timeout"), (65536, "oom"))]
    records += [synthetic.failed(synthetic.case("linear", n=4096), "oom")]  # never taken apart
    (group,) = anatomy.groups(frame.load(synthetic.write(tmp_path, "speed", records))[0])
    drawn = anatomy.data(group.rows)
    failed = drawn[drawn["status"] != "ok"]
    assert list(zip(failed["series"], failed["n"], failed["status"], strict=True)) == [
        ("Softmax (flash)", 4096, "oom"),
        ("Softmax (flash)", 16384, "timeout"),
    ]
    figure = anatomy.build(group.rows)
    assert figure is not None
    marks = {
        name: [(t.get_position()[0], t.get_text()) for t in panel(figure, name).texts] for name in ("MiTA", "Softmax (flash)", "Top-k")
    }
    assert marks == {"MiTA": [], "Softmax (flash)": [(1, "O"), (2, "T")], "Top-k": [(1, "-"), (2, "-")]}
    assert {x for x, *_ in bars(panel(figure, "MiTA"))} == {0, 1, 2}
    caption = captioned(figure)
    assert "Letters: O out of memory, T timed out." in caption
    assert "- not taken apart." in caption


def test_a_cell_timed_again_keeps_the_stages_and_the_time_of_the_attempt_that_was_taken_apart(tmp_path):
    again = synthetic.ok(synthetic.case("softmax@flash", {}, n=1024), 5 * WHOLE_S, spread=0)
    table = frame.load(synthetic.write(tmp_path, "speed", [record("softmax@flash", 1024), record("mita", 1024), again]))[0]
    drawn = anatomy.data(table)
    assert set(drawn["label"]) == {"softmax@flash", "mita"}
    assert drawn["whole_ms"].tolist() == pytest.approx([WHOLE_S * 1e3] * len(drawn)), "shares are of what was taken apart"
    figure = anatomy.build(table)
    assert figure is not None
    assert "Timed and taken apart in an earlier attempt than the last: 1 of 2 cells." in captioned(figure)


def test_one_launch_is_told_as_one():
    assert anatomy._count(1, "launch", "launches") == "1 launch"
    assert anatomy._count(0, "wait", "waits") == "0 waits"


def test_the_floor_and_the_timed_call_do_not_look_alike(forward):
    figure = anatomy.build(forward)
    assert figure is not None
    legend = next(a.get_legend() for a in figure.axes if a.get_legend())
    assert [t.get_text() for t in legend.get_texts()][-2:] == ["roofline floor", "timed call"]
    axes = panel(figure, "MiTA")
    below = figure.axes[figure.axes.index(axes) + 1]
    (timed,) = (line for line in below.lines if line.get_color() == "black")
    marks = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert marks == {("-", "None")}
    assert (timed.get_linestyle(), timed.get_marker()) == ("--", "o")
    found = [(line.get_linestyle(), line.get_marker()) for line in legend.findobj(Line2D)]
    assert {("-", "None"), ("--", "o")} <= set(found), "as in the panels"
