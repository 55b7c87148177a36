"""The figure of equal width draws every method and budget: against time, or in rows where nothing was timed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import synthetic
from figures_support import captioned

from attnbench import frame, suite_file
from attnbench.figures import equal_width, planned

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """Made-up records of the built-in suite at two lengths, one of which ran out of memory."""
    chosen = suite_file.load("equal-width").override({"n": [1024, 4096], "budget": [64, 256], "profile": ["randn", "clustered"]}, [], {})
    records = []
    for i, (case, budget) in enumerate(chosen.planned().items()):
        if case.method == "spark" and case.n == 4096:
            records.append(replace(synthetic.failed(case, "oom"), budget=budget))
            continue
        off = 1.2 if (case.method, case.n, budget) == ("pvt", 1024, (64,)) else 1.0
        metrics = {"rel_error": 1e-3 if case.method == "softmax" else 1 / (i + 2), "width": off * (sum(budget) or case.n)}
        records.append(synthetic.ok(case, 1e-4 * (i + 1), metrics=metrics, budget=budget, learned=5 * (case.method in ("dsa", "pvt"))))
    return frame.load(synthetic.write(tmp_path, "equal-width", records))[0]


def test_the_figure_has_a_point_for_each_method_and_budget(table: Any) -> None:
    drawn = equal_width.data(table)
    names = {
        "Agent",
        "DSA",
        "Linear",
        "MiTA",
        "MiTA, routed=False",
        "MiTA, shared=False",
        "MoBA",
        "Nystromformer",
        "Softmax",
        "Spark",
        "Top-k",
    }
    assert names | {"Sliding window"} <= set(drawn["series"])
    one = drawn[(drawn["profile"] == "randn") & (drawn["n"] == 1024)]
    assert set(one.loc[one["series"] == "MiTA", "budget"]) == {64, 256}
    assert set(one.loc[one["series"].isin(["Softmax", "Linear"]), "budget"]) == {equal_width.FIXED}
    measured = table[table["status"] == "ok"]
    assert len(drawn) == len(measured)
    assert sorted(drawn["time_ms"]) == pytest.approx(sorted(measured["time_s"] * 1e3))
    assert set(drawn.loc[drawn["series"] == "Spark", "n"]) == {1024}


def test_the_figure_draws_its_data_a_panel_a_length_and_profile(table: Any) -> None:
    figure, drawn = equal_width.build(table), equal_width.data(table)
    assert figure is not None
    panels = {a.get_title(): a for a in figure.axes if a.get_title()}
    assert set(panels) == {f"{profile}, N={n}" for profile in ("randn", "clustered") for n in ("1k", "4k")}
    for title, axes in panels.items():
        profile, n = title.split(", N=")
        part = drawn[(drawn["profile"] == profile) & (drawn["n"] == {"1k": 1024, "4k": 4096}[n]) & ~drawn["exact"]]
        points = {tuple(xy) for line in axes.lines if line.get_marker() != "None" for xy in line.get_xydata()}
        assert points == set(zip(part["time_ms"], part["rel_error"], strict=True))
        exact = drawn[(drawn["profile"] == profile) & (drawn["n"] == part["n"].iloc[0]) & drawn["exact"]]
        rivals = [*zip(part["time_ms"], part["rel_error"], strict=True), *((t, 0.0) for t in exact["time_ms"])]
        front = [p.series for p in part.itertuples() if not any(
            t <= p.time_ms and e <= p.rel_error and (t, e) != (p.time_ms, p.rel_error) for t, e in rivals
        )]  # fmt: skip
        assert {t.get_text() for t in axes.texts} == set(front) == set(part.loc[part["front"], "series"])
    caption = captioned(figure)
    assert "Hidden units that a query reads: 64, 256, larger markers for more; fixed by the method: " in caption
    assert "InLine, Linear, MHLA, PolaFormer, cosFormer." in caption
    assert "as initialised, untrained: DSA, PVT." in caption
    assert "MoBA: topk=2" in caption
    assert "Failed: 4 spark (oom)" in caption
    assert "Further than 15% from the budget: PVT 77 for 64 at N=1k." in caption


def test_few_methods_are_all_named(table: Any) -> None:
    own = table[table["method"].isin(["softmax", "mita", "agent", "topk"])]
    figure = equal_width.build(own)
    assert figure is not None
    for axes in (a for a in figure.axes if a.get_title()):
        assert {t.get_text() for t in axes.texts} == {"MiTA", "MiTA, routed=False", "MiTA, shared=False", "Agent", "Top-k"}


def test_cells_without_times_stand_in_rows(table: Any) -> None:
    figure, drawn = equal_width.build(table.assign(time_s=float("nan"))), equal_width.data(table)
    assert figure is not None
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == list(dict.fromkeys(drawn.loc[~drawn["exact"], "series"]))
    for axes in figure.axes:
        profile, n = axes.get_title().split(", N=")
        part = drawn[(drawn["profile"] == profile) & (drawn["n"] == {"1k": 1024, "4k": 4096}[n])]
        points = {tuple(xy) for line in axes.lines if line.get_marker() != "None" for xy in line.get_xydata()}
        own = part[~part["exact"]]
        assert points == {(x, names.index(name)) for x, name in zip(own["rel_error"], own["series"], strict=True)}
        (exact,) = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert set(exact.get_xdata()) == set(part.loc[part["exact"], "rel_error"])
    assert "Dashed" not in figure.get_supxlabel()
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"64 units a query", "256 units a query", "exact softmax, rounded"}


def test_without_budgets_there_is_no_such_figure(table: Any) -> None:
    without = table.assign(budget=[()] * len(table))
    assert equal_width.data(without).empty
    assert equal_width.build(without) is None
    assert list(equal_width.groups(without)) == []
    assert equal_width.data(table.drop(columns="budget")).empty
    assert [g.suite for g in equal_width.groups(table)] == ["equal-width"]


def test_figures_that_would_name_every_setting_are_drawn_only_when_asked_for(table: Any) -> None:
    names = {module.NAME for module, _ in planned(table)}
    assert "equal_width" in names
    assert names.isdisjoint({"fidelity", "pareto", "recall"})
    assert {module.NAME for module, _ in planned(table, ["fidelity", "pareto"])} == {"fidelity", "pareto"}
    one = table[table["budget"].map(lambda asked: asked in ((), (64,)))]
    assert {"fidelity", "pareto"} <= {module.NAME for module, _ in planned(one)}, "one budget is one setting a method"
