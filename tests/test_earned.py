"""Trained accuracy as a table and as figures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from figures_support import captioned

import attnbench
from attnbench import earned, frame, tables
from attnbench.case import Case
from attnbench.figures import accuracy, curves, pruned, scores
from attnbench.record import Memory, Record, Status, Timing
from attnbench.trials import Training, Trial


def case(method: str, params: dict[str, object] | None = None, **changes: Any) -> Case:
    values = tuple(sorted(attnbench.get(method).parse(params or {}).as_dict().items()))
    own = {"data": "mqar", "n": 64, "steps": 10, "depth": 1, "rates": "0.001", "batch": 8}
    return Case(task="accuracy", method=method, params=values, **{**own, **changes})


def reached(made: Case, value: float) -> Record:
    trials = tuple(Trial(r, 10, ((10, 1.0),), ((5, value / 2), (10, v)), False, 1e3) for r, v in ((1e-4, 0.0), (1e-3, value)))
    training = Training(trials, 1e-3, 100, 0, 16, {"4": value}, "pairs", 0.25)
    return Record(made, Status.OK, "e", "eager", training=training, metrics={"accuracy": value})


def table(*records: Record) -> pd.DataFrame:
    return pd.DataFrame([frame._row(r, "accuracy", {"device": "a device"}) for r in records])


ROUTE, FULL = {"shared": False, "landmarks": 8, "topk": 16}, {"landmarks": 4, "topk": 8}
RECORDS = [
    *(reached(case("softmax", seed=s), v) for s, v in enumerate((0.9, 0.8, 1.0))),
    *(reached(case("softmax", {"causal": True}, seed=s), 0.5) for s in range(3)),
    *(reached(case("mita", FULL, seed=s), 0.7) for s in range(3)),
    *(reached(case("mita", ROUTE, seed=s), 0.6) for s in range(2)),
    Record(case("mita", ROUTE, seed=2), Status.DIVERGED, "e", reasons=("loss",)),
    Record(case("mita", {**FULL, "causal": True}), Status.UNSUPPORTED, "e", reasons=("no causal form",)),
    reached(case("mita", {**FULL, "landmarks": 9, "grid": "8x8"}, data="pathfinder"), 0.55),
    reached(case("mita", {**ROUTE, "grid": "8x8"}, data="pathfinder"), 0.45),
]


def timed(made: Case, time: float, *, suite: str = "speed", **changes: Any) -> dict[str, Any]:
    plain = replace(made, **{"task": "speed", "data": "", "steps": 0, "depth": 0, "rates": "", "batch": 1, **changes})
    record = Record(plain, Status.OK, "e", "eager", timing=Timing((time,), 0.1, "cpu"), memory=Memory(2**21, 0, 0, 0, 0, "test"))
    return frame._row(record, suite, {"device": "a device"})


def test_the_table_joins_accuracy_over_seeds_with_what_was_measured_elsewhere() -> None:
    others = pd.DataFrame([
        timed(case("mita", FULL), 2e-3), timed(case("mita", {**FULL, "topk": 9}), 5e-3), timed(case("softmax"), 7e-3),
        timed(case("mita", FULL, n=128), 1.0), timed(case("mita", FULL), 9.0, mode="forward+backward"),
        timed(case("mita", FULL), 8.0, replicate=1),
    ])  # fmt: skip
    found = earned.lines(table(*RECORDS), others)
    assert found.header == ("method", "family", "N", "mqar", "mqar, causal", "pathfinder", "ms", "MiB", "costs of")
    by_name, none = {line[0]: line[3:] for line in found.rows}, earned.NONE
    assert by_name["Softmax"] == ("0.900 ± 0.100", "0.500 ± 0.000", none, "7", "2", "the same")
    assert by_name["MiTA"] == ("0.700 ± 0.000", "unsupported", "0.550", "2", "2", "the same / landmarks=4")
    assert by_name["MiTA, shared=False"] == ("diverged in 1 of 3", none, "0.450", none, none, none), "full and route-only are two things"
    assert len(found.rows) == 3
    assert found.methods == ("softmax", "mita", "mita")
    assert found.notes == ("Time and memory: forward pass, speed (a device, B=1, H=1, D=64, float32, randn inputs), at equal N.",)


def test_seeds_that_are_still_to_come_are_told() -> None:
    rows = earned.asked(table(*RECORDS[:3], reached(case("topk"), 0.4), reached(case("topk", seed=1), 0.6)))
    assert str(earned.cells(rows)["Top-k", "mqar", 64]) == "0.500 ± 0.141 (2 of 3 seeds)"


def test_a_budget_names_what_it_set_and_numbers_name_the_rest() -> None:
    records = [replace(reached(case("topk", {"topk": k}, n=n), 0.5), budget=(b,)) for b in (8, 16) for n, k in ((64, b), (128, b + 1))]
    rows = earned.asked(table(*records, reached(case("topk", {"topk": 5}), 0.5)))
    assert set(rows["series"]) == {"Top-k, budget=8", "Top-k, budget=16", "Top-k, topk=5"}


def test_beside_budgets_only_numbers_that_differ_are_named() -> None:
    fixed = {"prefix": 0, "shared": True, "shared_scale": "1/d"}
    by_budget = [replace(reached(case("mita", {**fixed, "landmarks": b, "topk": b}), 0.5), budget=(2 * b,)) for b in (4, 8)]
    by_number = [reached(case("mita", {**fixed, "landmarks": m, "topk": k}), 0.5) for m, k in ((4, 8), (9, 4))]
    route = reached(case("mita", {**fixed, "shared": False, "landmarks": 4, "topk": 8}), 0.5)
    rows = earned.asked(table(*by_budget, *by_number, route))
    budgets, numbers = {"MiTA, budget=8", "MiTA, budget=16"}, {"MiTA, landmarks=4, topk=8", "MiTA, landmarks=9, topk=4"}
    assert set(rows["series"]) == budgets | numbers | {"MiTA, shared=False, landmarks=4, topk=8"}


def test_the_report_names_seeds_and_steps() -> None:
    (found,) = [t for t in tables.report(table(*RECORDS)) if t.name.endswith("accuracy")]
    assert "over seeds 0, 1, 2, at most 10 steps" in found.caption
    assert "diverged" in found.markdown()


def test_the_figure_draws_means_ranges_and_what_failed() -> None:
    drawn = accuracy.data(table(*RECORDS)).set_index(["panel", "method"])
    dense = drawn.loc[("mqar", "softmax")]
    assert (dense["value"], dense["low"], dense["high"], dense["seeds"], dense["chance"]) == (pytest.approx(0.9), 0.8, 1.0, 3, 0.25)
    assert set(drawn.loc[("mqar", "mita"), "status"]) == {"ok", "diverged"}
    assert drawn.loc[("mqar", "mita")].query("status == 'diverged'")["value"].isna().all(), "never a mean of the survivors"
    figure = accuracy.build(table(*RECORDS))
    assert figure is not None
    assert [t for a in figure.axes if (t := a.get_title())] == ["mqar", "mqar, causal", "pathfinder"]
    letters = sorted(t.get_text() for a in figure.axes for t in a.texts)
    assert letters == ["D", "U"]
    caption = captioned(figure)
    assert "Fewer: MiTA at mqar, causal" in caption
    assert "U unsupported, D training diverged" in caption


def test_a_task_at_several_lengths_has_lines_and_every_length_a_panel_of_scores() -> None:
    more = [reached(case("softmax", n=n, seed=i), 0.9) for n in (16, 128) for i in (0, 1, 2)]
    drawn = table(*RECORDS, *more)
    assert set(accuracy.data(drawn)["panel"]) == {"mqar"}, "one length makes no line"
    found = scores.data(drawn)
    assert set(found["panel"]) == {"mqar, N=16", "mqar, N=64", "mqar, N=128", "mqar, causal, N=64", "pathfinder, N=64"}
    one = found[(found["panel"] == "mqar, N=64") & (found["method"] == "softmax")].iloc[0]
    assert (one["value"], one["low"], one["high"], one["asked"]) == (pytest.approx(0.9), 0.8, 1.0, "mqar")
    figure = scores.build(drawn)
    assert figure is not None
    titles = [a.get_title().replace("\n", " ") for a in figure.axes if a.get_visible()]
    assert titles == ["mqar, N=16", "mqar, N=64", "mqar, N=128", "mqar, causal, N=64", "pathfinder, N=64"]
    assert {t.get_text() for t in figure.axes[0].get_yticklabels()} == set(found["series"])
    assert sorted(t.get_text() for a in figure.axes for t in a.texts) == ["D", "U"]
    dotted = [line for a in figure.axes for line in a.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [0.25] * 5  # type: ignore[index]


def test_learning_curves_are_those_of_the_rate_chosen_over_seeds() -> None:
    drawn = curves.data(table(*RECORDS))
    one = drawn[(drawn["panel"] == "mqar, N=64") & (drawn["method"] == "softmax")]
    points = list(zip(one["n"], one["value"], one["low"], one["high"], strict=True))
    assert points == [(5, pytest.approx(0.45), 0.4, 0.5), (10, pytest.approx(0.9), 0.8, 1.0)]
    assert curves.build(table(*RECORDS)) is not None


def test_long_titles_are_broken_to_their_panels() -> None:
    made = [case("topk", {"causal": c}, data=d, n=4096) for d in ("mqar", "pathfinder:graded") for c in (False, True)]
    records = [reached(c, 0.9) for c in made]
    figure = pruned.build(table(*(replace(r, training=replace(r.training, pruned=(0.5, 0.4))) for r in records)))  # type: ignore[type-var]
    assert figure is not None
    figure.draw_without_rendering()
    boxes = {a.get_title().replace("\n", " "): a.title.get_window_extent() for a in figure.axes if a.get_title()}
    assert list(boxes) == ["mqar, N=4096", "mqar, causal, N=4096", "pathfinder (graded), N=4096", "pathfinder (graded), causal, N=4096"]
    assert max(box.x1 for box in boxes.values()) <= figure.bbox.x1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))


def test_a_run_that_stopped_at_the_target_keeps_its_last_value() -> None:
    early = reached(case("softmax", seed=1), 1.0)
    trials = tuple(replace(t, steps=5, validation=t.validation[:1]) for t in early.training.trials)  # type: ignore[union-attr]
    early = replace(early, training=replace(early.training, trials=trials))  # type: ignore[type-var]
    drawn = curves.data(table(reached(case("softmax"), 0.8), early)).set_index("n")
    assert drawn.loc[10, ["value", "low", "high"]].tolist() == [pytest.approx(0.65), 0.5, 0.8]


def test_suites_whose_tasks_are_many_are_split_into_figures_by_task() -> None:
    assert [g.place for g in curves.groups(table(*RECORDS))] == ["a-device-mqar", "a-device-pathfinder"]


def test_lengths_that_train_for_other_numbers_of_steps_share_a_panel() -> None:
    short = [reached(case("softmax", n=64, steps=steps), 0.5) for steps in (1, 10)]
    rows = earned.asked(table(*short, *(reached(case("softmax", n=128, steps=steps), 0.5) for steps in (1, 20))))
    assert set(zip(rows["panel"], rows["n"], rows["steps"], strict=True)) == {
        ("mqar, steps=1", 64, 1), ("mqar, steps=1", 128, 1), ("mqar, all steps", 64, 10), ("mqar, all steps", 128, 20),
    }  # fmt: skip
    assert earned.all_steps(rows) == "mqar, all steps: 10 at N=64, 20 at N=128"
    assert set(earned.asked(table(*short))["panel"]) == {"mqar, steps=1", "mqar, steps=10"}
    begun = earned.asked(table(*short, reached(case("softmax", n=128, steps=1), 0.5)))
    assert set(begun["panel"]) == {"mqar, steps=1", "mqar, steps=10"}, "where the longest is still to come it is none of all"
    assert earned.all_steps(begun) == ""


@pytest.mark.parametrize("module", [accuracy, curves, scores])
def test_where_nothing_was_trained_nothing_is_drawn(module: Any) -> None:
    failed = Record(case("softmax"), Status.DIVERGED, "e", reasons=("loss",))
    assert module.build(table(failed)) is None
    assert module.build(pd.DataFrame()) is None


def test_models_that_were_trained_otherwise_are_never_averaged() -> None:
    rows = earned.asked(
        table(reached(case("softmax"), 0.9), reached(case("softmax", steps=20), 0.5), reached(case("softmax", depth=2), 0.1))
    )
    assert set(rows["panel"]) == {"mqar, steps=10, depth=1", "mqar, steps=20", "mqar, steps=10, depth=2"}
    assert all(len(cell.values) == 1 for cell in earned.cells(rows).values())
    models = [case("softmax", **changes) for changes in ({}, {"model": "vit"}, {"model": "vit", "recipe": "deit"})]
    rows = earned.asked(table(*(reached(made, 0.5) for made in models)))
    assert set(rows["panel"]) == {
        "mqar, model=small", "mqar, model=vit, recipe=small", "mqar, model=vit, recipe=deit",
    }  # fmt: skip


def test_levels_are_panels_and_files_of_their_own() -> None:
    data = pd.Series(["pathfinder", "pathfinder:easy"])
    assert earned.titles(data) == {"pathfinder": "pathfinder", "pathfinder:easy": "pathfinder (easy)"}
    trained = table(*(reached(case("softmax", data=text), 0.5) for text in data))
    assert set(earned.asked(trained)["panel"]) == {"pathfinder", "pathfinder (easy)"}
    assert [g.place for g in curves.groups(trained)] == ["a-device-pathfinder", "a-device-pathfinder-easy"]


def test_folders_are_printed_by_their_names_where_these_differ() -> None:
    data = pd.Series(["mqar", "images:/data/cats", "images:/data/dogs", "images:/old/dogs"])
    assert earned.titles(data) == {**dict(zip(data, data, strict=True)), "images:/data/cats": "images (cats)"}
    trained = table(*(reached(case("softmax", data=text), 0.5) for text in data))
    assert [g.place for g in curves.groups(trained)] == [
        f"a-device-{x}" for x in ("images-cats", "images-data-dogs", "images-old-dogs", "mqar")
    ]
