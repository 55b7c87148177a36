"""Figures of trained models, swap-ins, token pruning and routing, from made-up records of the real suites."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import synthetic
import synthetic_trained
from figures_support import captioned

from attnbench import earned, figures, frame, suite_file, tables
from attnbench.figures import (
    accuracy,
    accuracy_time,
    scores,
    slices,
    swap_heat,
    swap_in,
)
from attnbench.trials import Training

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = [1024, 4096]
OTHERS = {"scores", "slices", "kept", "curves", "busiest", "expert_load", "pruned", "pruned_length", "swap_heat", "swap_in"}
MODULES = [module for name, module in figures.modules().items() if name in OTHERS or name.startswith("accuracy")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("results")
    trained_on = {"mqar": {"n": LENGTHS}, "pathfinder": {"n": [1024], "seed": [0, 1]}}
    synthetic.write(
        folder, "accuracy", [r for d, axes in trained_on.items() for r in synthetic_trained.records("accuracy", data=[d], **axes)]
    )
    synthetic.write(folder, "swap_in", synthetic_trained.records("swap_in", data=["mqar"], n=[256], seed=[0, 1, 2]))
    synthetic.write(folder, "pruning", synthetic_trained.records("pruning", data=["digits"], n=[1024], seed=[0, 1]))
    return frame.load(synthetic.write(folder, "accuracy-cost", synthetic_trained.costs((1024, 4096))))[0]


def of(loaded: pd.DataFrame, name: str) -> pd.DataFrame:
    return loaded[loaded["suite"].isin([name, "accuracy-cost"])]


@pytest.fixture(scope="module")
def points(loaded: pd.DataFrame) -> pd.DataFrame:
    return accuracy_time.data(of(loaded, "accuracy"))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.NAME)
def test_every_figure_draws_what_it_says_and_nothing_of_nothing(module: Any, loaded: pd.DataFrame) -> None:
    drawn = 0
    for group in figures.parts(module, loaded):
        data = module.data(group.rows)
        figure = module.build(group.rows)
        assert (figure is None) == data.empty
        drawn += figure is not None
        if figure is not None:
            assert captioned(figure).startswith(("Test GPU 80GB, B=", "N=1024, Test GPU", "N=4096, Test GPU"))
    assert drawn
    untrained = loaded[loaded["task"] != earned.TASK]
    assert module.build(untrained) is None
    assert module.data(untrained).empty
    failed = loaded[(loaded["task"] == earned.TASK) & (loaded["status"] != "ok")]
    assert module.build(failed) is None


def test_more_than_eight_methods_stand_in_rows_by_family_with_the_best_dense_in_grey(loaded: pd.DataFrame) -> None:
    drawn = accuracy.data(of(loaded, "accuracy"))
    grey = drawn[drawn["kind"] == "baseline"].set_index(["panel", "n"])["value"]
    dense = drawn[drawn["series"] == "Softmax"].set_index(["panel", "n"])["value"]
    assert grey.sort_index().tolist() == dense.sort_index().tolist()
    figure = accuracy.build(of(loaded, "accuracy"))
    assert figure is not None
    lines = [sum(line.get_marker() not in ("", "None", None) for line in a.lines) for a in figure.axes if a.get_xscale() == "log"]
    assert max(lines) <= 8
    assert {"Softmax", "MiTA", "MiTA, shared=False", "MiTA, routed=False"} <= set(drawn["series"])


def test_partly_finished_suites_show_what_there_is_and_say_what_is_missing(loaded: pd.DataFrame) -> None:
    drawn = accuracy.data(of(loaded, "accuracy")).set_index(["panel", "method", "n"])
    assert drawn.loc[("mqar", "bra", 4096), "seeds"] == 2
    assert drawn.loc[("mqar", "nsa", 4096), "status"] == "timeout"
    assert drawn.loc[("mqar, causal", "agent", 1024), "status"] == "unsupported"
    caption = captioned(accuracy.build(of(loaded, "accuracy")))
    assert "Fewer: BRA at mqar." in caption
    assert "Fewer: Agent at pathfinder, N=1k; BRA at mqar, N=4k; BRA at" in captioned(scores.build(of(loaded, "accuracy")))
    assert "T timed out, U unsupported, D training diverged" in caption


def test_accuracy_meets_costs_of_the_same_parameters_at_the_same_length(points: pd.DataFrame, loaded: pd.DataFrame) -> None:
    costs = loaded[
        (loaded["suite"] == "accuracy-cost") & (loaded["method"] == "linear") & (loaded["n"] == 1024) & (loaded["status"] == "ok")
    ]
    time = costs[~costs["params"].str.contains('"causal": true')]["time_s"].median()
    one = points[(points["panel"] == "mqar, N=1024") & (points["method"] == "linear")].iloc[0]
    assert (one["cost"], one["differs"], one["apart"]) == (pytest.approx(1e3 * time), "", "")
    assert one["low"] <= one["value"] <= one["high"]
    assert set(points["differs"]) == {""}, "the suite accuracy-cost holds every configuration of the suite accuracy"
    assert "topk" not in set(points.loc[points["n"] == 4096, "method"]), "out of memory there"


def test_the_front_is_what_nothing_beats(points: pd.DataFrame) -> None:
    for _, panel in points.groupby("panel"):
        for p in panel.to_dict("records"):
            better = panel[(panel["cost"] <= p["cost"]) & (panel["value"] >= p["value"])]
            assert p["front"] == (len(better) == 1)


def test_methods_are_named_at_their_points_and_sources_in_the_caption(points: pd.DataFrame, loaded: pd.DataFrame) -> None:
    figure = accuracy_time.build(of(loaded, "accuracy"))
    assert figure is not None
    for axes in figure.axes:
        if axes.get_title():
            assert {t.get_text() for t in axes.texts} == set(points.loc[points["panel"] == axes.get_title(), "series"])
    assert "Time per call: forward pass, accuracy-cost (Test GPU 80GB, B=16, H=2, D=64, bfloat16, L2 cold), at equal N." in captioned(
        figure
    )


def test_costs_with_other_parameters_are_hollow_and_told(loaded: pd.DataFrame, tmp_path: Path) -> None:
    cells = suite_file.load("accuracy-cost").override({"n": [1024]}, ["softmax", "topk"], {"topk": {"topk": 32}}).expand()
    speed = frame.load(synthetic.write(tmp_path, "speed", [synthetic.ok(c, 1e-3, metrics={"rel_error": 0.1}) for c in cells]))[0]
    both = pd.concat([loaded[loaded["suite"] == "accuracy"], speed])
    drawn = accuracy_time.data(both).set_index(["panel", "method"])
    assert drawn.loc[("mqar, N=4096", "topk"), ["differs", "apart"]].tolist() == ["topk=32", "N=1024"]
    caption = captioned(accuracy_time.build(both))
    assert "Hollow: not measured with the parameters trained with, but with Top-k: topk=32." in caption
    assert "at equal N; mqar, N=4096 from N=1024" in caption
    assert "Nowhere measured: Agent, BRA" in caption


def test_budgets_of_swap_ins_are_an_axis_and_grids_a_heat_map(loaded: pd.DataFrame) -> None:
    rows = loaded[loaded["suite"] == "swap_in"]
    curve = swap_in.data(rows)
    panel = curve[curve["panel"] == "mqar, trained with Softmax, N=256"]
    assert panel.groupby("series")["n"].apply(list).to_dict()["MiTA"] == [16, 32, 64, 128]
    assert panel[panel["fixed"]].groupby("series")["value"].nunique().to_dict() == {"Linear": 1, "Softmax": 1}
    assert panel["before"].tolist() == pytest.approx([0.96] * len(panel))
    heat = swap_heat.data(rows)
    cell = heat[(heat["panel"] == "mqar, trained with Softmax, N=256") & (heat["y"] == 16) & (heat["x"] == 64)].iloc[0]
    own = rows[
        (rows["trained_with"] == "softmax") & rows["params"].str.contains('"landmarks": 16,') & rows["params"].str.contains('"topk": 64')
    ]
    assert (cell["value"], cell["sd"], cell["seeds"]) == (pytest.approx(own["accuracy"].mean()), pytest.approx(own["accuracy"].std()), 3)
    assert (set(heat["down"]), set(heat["across"]), set(heat["series"])) == ({"landmarks"}, {"topk"}, {"MiTA"})
    grid = heat[heat["panel"] == cell["panel"]]
    assert sorted(zip(grid["y"], grid["x"], strict=True)) == [(y, x) for y in (9, 16, 36, 64) for x in (16, 32, 64, 128)]
    figure = swap_heat.build(rows)
    assert figure is not None
    assert f"{cell['value']:.3f}\n±{cell['sd']:.3f}" in {t.get_text() for a in figure.axes for t in a.texts}


def test_swap_ins_have_a_table_of_their_own_and_are_in_no_other(loaded: pd.DataFrame) -> None:
    made = {t.name: t for t in tables.report(of(loaded, "swap_in"))}
    own = made["swap_in-test-gpu-80gb-swapped"]
    assert "swap_in-test-gpu-80gb-accuracy" not in made
    assert own.header[3:] == ("mqar, trained with MiTA (landmarks=32, topk=32)", "mqar, trained with Softmax")
    assert "mqar, trained with Softmax, N=256: 0.960 ± 0.010" in own.notes[0]
    assert accuracy.data(of(loaded, "swap_in")).empty


def test_a_seed_that_was_trained_again_counts_once_and_is_told(loaded: pd.DataFrame) -> None:
    swapped = loaded[(loaded["suite"] == "swap_in") & (loaded["trained_with"] == "softmax")]
    again = swapped.assign(accuracy_before=swapped["accuracy_before"].mask((swapped["seed"] == 1) & (swapped["method"] == "moba"), 0.5))
    rows = earned.asked(again, swapped=True)
    assert earned.before(rows).tolist() == [pytest.approx(0.97), pytest.approx((0.96 + 0.5) / 2), pytest.approx(0.95)]
    told = "Trained more than once: mqar, trained with Softmax, N=256, seed 1."
    assert earned.several_models(rows) == told
    assert earned.several_models(earned.asked(swapped, swapped=True)) == ""
    for module in (swap_in, swap_heat):
        assert told in captioned(module.build(again))
        assert "Trained more than once" not in captioned(module.build(swapped))
    drawn = swap_in.data(again)
    assert drawn["before"].tolist() == [pytest.approx((0.97 + 0.73 + 0.95) / 3)] * len(drawn)


def test_a_swept_parameter_is_set_by_no_budget() -> None:
    axes = {"data": ["mqar"], "n": [256], "seed": [0], "trained_with": ["softmax"]}
    planned = suite_file.load("swap_in").override(axes, ["mita"], {}).planned()
    params = {(dict(c.params)["landmarks"], dict(c.params)["topk"], dict(c.params)["shared"]): b for c, b in planned.items()}
    assert {key[:2] for key in params if key[2]} >= {(m, k) for m in (9, 16, 36, 64) for k in (16, 32, 64, 128)}
    assert params[9, 128, True] == (), "no budget set it"
    assert params[32, 32, True] == (64,)
    assert params[64, 64, True] == (128,), "asked for by both"


def own_groups(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with a slice more in every model of seed 0."""
    more = [
        replace(t, groups={**t.groups, "31-40": 0.5}) if isinstance(t, Training) and seed == 0 else t
        for t, seed in zip(rows["training"], rows["seed"], strict=True)
    ]
    return rows.assign(training=pd.Series(more, rows.index, dtype=object))


def test_slices_are_drawn_where_they_are_in_order(loaded: pd.DataFrame) -> None:
    parts = {g.place.rpartition("-")[2]: g.rows for g in figures.parts(slices, loaded) if g.suite == "accuracy"}
    assert set(parts) == {"mqar", "pathfinder"}
    drawn = slices.data(parts["mqar"])
    own = drawn[(drawn["panel"] == "mqar, N=1024") & (drawn["series"] == "Softmax")]
    reached = parts["mqar"].query("method == 'softmax' and n == 1024 and status == 'ok'")
    reached = reached[~reached["params"].map(lambda p: json.loads(p)["causal"])]["accuracy"]
    assert own["n"].tolist() == [4, 8, 16], "a range stands at its lower end"
    assert own["value"].tolist() == pytest.approx([share * reached.mean() for share in (1, 0.9, 0.7)])
    assert own["low"].tolist() == pytest.approx([share * reached.min() for share in (1, 0.9, 0.7)])
    assert set(drawn["counts"].dropna()) == {"pairs"}
    figure = slices.build(parts["mqar"])
    assert figure is not None
    assert "pairs" in {a.get_xlabel() for a in figure.axes}
    assert figure.get_supylabel() == "test accuracy, mqar"
    first = own_groups(parts["mqar"])
    assert 31 not in slices.data(first)["n"].tolist(), "a range that one seed alone has is left out"
    digits = loaded[(loaded["suite"] == "pruning") & (loaded["data"] == "digits")]
    assert slices.data(digits).empty, "nothing grows along classes"


def test_panels_that_are_wrapped_keep_their_titles(loaded: pd.DataFrame) -> None:
    rows = of(loaded, "accuracy")
    longer = rows[rows["data"] == "pathfinder"].assign(n=4096, case_id=lambda r: r["case_id"] + " at 4096")
    figure = accuracy.build(pd.concat([rows, longer], ignore_index=True), columns=1)
    assert figure is not None
    titles = [t for a in figure.axes if (t := a.get_title())]
    assert titles == ["mqar", "mqar, causal", "pathfinder"] * 6, "three panels in two rows for each of six families"
