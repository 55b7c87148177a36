"""Comparisons of two results, and of two methods in one."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import synthetic

from attnbench import compare, figures, frame, tables
from attnbench.errors import UserError
from attnbench.stats import Verdict

LENGTHS = (128, 256, 512)


def load(folder, records, suite="speed", device=synthetic.DEVICE):
    return frame.load(synthetic.write(folder, suite, records, {"device": device}))[0]


def sweep(label, times, seed=0, **rest):
    return [synthetic.ok(synthetic.case(label, n=n, **rest), t, spread=0.003, seed=seed) for n, t in zip(LENGTHS, times, strict=False)]


def test_verdicts_say_what_b_is(tmp_path):
    a = load(tmp_path / "a", sweep("softmax", (1e-3, 2e-3, 4e-3)))
    b = load(tmp_path / "b", sweep("softmax", (2e-3, 2e-3, 2e-3), seed=1))
    found = compare.results(a, b)
    assert [(c.n, c.verdict) for c in found] == [(128, Verdict.SLOWER), (256, Verdict.NOT_SEPARABLE), (512, Verdict.FASTER)]
    assert found[0].ratio is not None
    assert found[0].ratio.value == pytest.approx(2, rel=0.01)
    assert found[0].time_b_s == pytest.approx(2 * found[0].time_a_s, rel=0.01)


def test_cells_of_one_side_and_failures_are_listed(tmp_path):
    a = load(tmp_path / "a", sweep("softmax", (1e-3, 2e-3, 4e-3)))
    b = load(
        tmp_path / "b", [*sweep("softmax", (1e-3,)), synthetic.failed(synthetic.case("softmax", n=256), "oom"), *sweep("linear", (1e-3,))]
    )
    found = {(c.series_a, c.n): c for c in compare.results(a, b)}
    assert len(found) == 4
    assert (found["Softmax", 256].status_b, found["Softmax", 256].verdict) == ("oom", None)
    assert found["Softmax", 512].status_b == compare.ABSENT
    assert (found["Linear", 128].status_a, found["Linear", 128].ratio) == (compare.ABSENT, None)
    assert str(found["Softmax", 256]) == "speed: Softmax, forward, N=256, randn: A ok, B oom"


def test_cells_without_clocks_are_neither_faster_nor_slower_and_are_drawn_and_reported(tmp_path):
    records = [replace(r, timing=None, metrics={"rel_error": 0.1}) for r in sweep("softmax", (1e-3,) * 3)]
    records += [replace(r, timing=None, metrics={"rel_error": 0.2}) for r in sweep("linear", (1e-3,) * 3)]
    untimed, timed = load(tmp_path / "a", records), load(tmp_path / "b", sweep("softmax", (1e-3,) * 3))
    assert {str(c) for c in compare.results(untimed, timed) if c.n == 128 and c.series_a == "Softmax"} == {
        "speed: Softmax, forward, N=128, randn: A untimed, B ok"
    }
    assert compare.fastest(untimed.to_dict("records"), []) is None
    assert any(compare.UNTIMED in row for table in tables.report(untimed) for row in table.rows)
    drawn = figures.draw_all(untimed, tmp_path / "figures", suffixes=(".csv",))
    assert {path.name.split("-")[1] for path in drawn} == {"memory"}


def test_the_larger_noise_floor_of_both_sides_counts(tmp_path):
    twice = synthetic.ok(synthetic.case("softmax", n=128, replicate=1), 1.2e-3, spread=0.003)
    a = load(tmp_path / "a", [*sweep("softmax", (1e-3,)), twice])
    b = load(tmp_path / "b", sweep("softmax", (1.1e-3,)))
    (cell,) = compare.results(a, b)
    assert cell.floor is not None
    assert cell.floor.pairs == 1
    assert cell.verdict is Verdict.NOT_SEPARABLE


def test_lone_devices_are_put_against_each_other_and_several_are_not(tmp_path):
    records = sweep("softmax", (1e-3,))
    a, b = load(tmp_path / "a", records), load(tmp_path / "b", records, device="Other GPU")
    assert [c.device for c in compare.results(a, b)] == [f"{synthetic.DEVICE} / Other GPU"]
    found = compare.results(a, pd.concat([a, b], ignore_index=True))
    assert {(c.device, c.status_a, c.status_b) for c in found} == {(synthetic.DEVICE, "ok", "ok"), ("Other GPU", "absent", "ok")}


def test_methods_of_one_result(tmp_path):
    records = [
        *sweep("softmax@flash", (1e-3, 4e-3, 16e-3)),
        *sweep("mita", (2e-3, 4e-3), params={"topk": 25}),
        *sweep("mita", (3e-3,), params={"topk": 64}),
    ]
    found = compare.methods(load(tmp_path, records), "softmax@flash", "mita")
    seen = {(c.series_b, c.n): (c.series_a, c.status_b, c.verdict) for c in found}
    assert seen["MiTA, topk=25", 128] == ("Softmax (flash)", "ok", Verdict.SLOWER)
    assert seen["MiTA, topk=25", 256][2] is Verdict.NOT_SEPARABLE
    assert seen["MiTA, topk=64", 512] == ("Softmax (flash)", "absent", None)
    assert len(found) == 6


def test_a_causal_mask_meets_a_causal_mask_where_both_have_one(tmp_path):
    records = [*(sweep(label, (1e-3,), params={"causal": causal})[0] for label in ("softmax", "topk") for causal in (True, False))]
    found = compare.methods(load(tmp_path / "both", records), "softmax", "topk")
    assert [(one.series_a, one.series_b) for one in found] == [
        (f"Softmax, causal={causal}", f"Top-k, causal={causal}") for causal in (False, True)
    ]
    (apart,) = compare.methods(load(tmp_path / "apart", [records[0], records[3]]), "softmax", "topk")
    assert apart.verdict is not None


def test_lines_are_all_different_and_sum_up_what_one_side_lacks(tmp_path):
    records = [
        *sweep("softmax", (1e-3, 2e-3, 4e-3)),
        *sweep("linear", (1e-3,)),
        *sweep("linear", (1e-3,), profile="needle"),
        *sweep("softmax", (1e-3,), profile="needle", heads=2),
        *sweep("linear", (1e-3,), profile="needle", heads=2),
    ]
    synthetic.write(tmp_path, "other", sweep("linear", (1e-3, 2e-3)))
    told = list(compare.lines(compare.methods(load(tmp_path, records), "softmax", "linear")))
    assert [line.partition(": B is")[0] for line in told] == [
        "speed: Softmax | Linear, forward, N=128, needle",
        "speed: Softmax | Linear, forward, N=128, randn",
        "other: A absent from 2 cells: not measured there",
        "speed: A absent from 1 cell: measured there at other lengths or under other conditions",
        "speed: B absent from 2 cells: measured there at other lengths or under other conditions",
    ]
    more = [*records, *sweep("softmax", (1e-3,), profile="needle")]
    found = compare.methods(load(tmp_path / "more", more), "softmax", "linear")
    told = [line.partition(": B is")[0] for line in compare.lines(found)]
    assert len(set(told)) == len(told) == 4
    assert [line for line in told if "H=2" in line]


def test_rows_are_json(tmp_path):
    table = load(tmp_path, sweep("softmax", (1e-3,)))
    data = json.loads(json.dumps(compare.results(table, table)[0].as_dict()))
    assert data["verdict"] == "not separable"
    assert data["ratio"]["value"] == 1.0


def test_unknown_methods_and_empty_tables_are_named(tmp_path):
    table = load(tmp_path, sweep("softmax", (1e-3,)))
    with pytest.raises(UserError, match="'softmaks' in these results: did you mean softmax"):
        compare.methods(table, "softmax", "softmaks")
    with pytest.raises(UserError, match="B holds no records"):
        compare.results(table, table.iloc[:0])
