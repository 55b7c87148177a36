"""The metric table, and how rows become series and groups."""

import math

import pandas as pd
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from attnbench import frame, metrics, series
from attnbench.metrics import METRICS


def table(tmp_path, records, suite="speed", environment=None):
    return frame.load(synthetic.write(tmp_path, suite, records, environment))[0]


def row(**values):
    base = {"batch": 2, "n": 1000, "time_s": 0.5, "flops": 8e12, "bytes": 1e9, "matmul_flops_per_s": 32e12, "copy_bytes_per_s": 1e12}
    return pd.DataFrame([base | values])


def test_derived_values():
    derived = metrics.add(row()).iloc[0]
    assert derived["tokens_per_s"] == 4000
    assert derived["achieved_flops_per_s"] == 16e12
    assert derived["floor_s"] == 0.25
    assert derived["efficiency"] == 0.5


def test_floor_is_the_slower_of_compute_and_traffic():
    assert metrics.add(row(bytes=4e11))["floor_s"].iloc[0] == 0.4


@pytest.mark.parametrize("missing", ["flops", "bytes", "matmul_flops_per_s", "copy_bytes_per_s"])
def test_unknown_ceilings_or_work_give_no_efficiency(missing):
    assert math.isnan(metrics.add(row(**{missing: None}))["efficiency"].iloc[0])
    assert math.isnan(metrics.add(row().drop(columns=missing))["efficiency"].iloc[0])


def test_failures_have_no_derived_values(tmp_path):
    records = [synthetic.failed(synthetic.case("softmax"), "oom"), synthetic.ok(synthetic.case("linear"), 1e-3)]
    derived = metrics.add(table(tmp_path, records)).set_index("status")
    assert derived.loc["oom", [m.column for m in METRICS.values()]].isna().all()
    assert derived.loc["ok", "tokens_per_s"] == pytest.approx(1024 / derived.loc["ok", "time_s"])


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_better_follows_the_direction(a, b):
    for name, metric in METRICS.items():
        assert metrics.better(name, a, b) == (a < b if metric.better == "lower" else a > b)


def test_a_shorter_time_is_better_in_every_metric_of_time():
    for name, metric in METRICS.items():
        if metric.of_time:
            slow, fast = (metric.at(row(), pd.Series([t])).iloc[0] for t in (2.0, 1.0))
            assert metrics.better(name, fast, slow), name


def test_labels_name_only_what_differs(tmp_path):
    cells = [
        ("topk", {"topk": 25, "sink": 1}),
        ("topk", {"topk": 64, "sink": 1}),
        ("linear", {}),
        ("softmax@flash", {}),
        ("stranger@x", {"a": 2}),
    ]
    rows = table(tmp_path, [synthetic.ok(synthetic.case(label, params), 1e-3) for label, params in cells])
    assert sorted(series.labels(rows)) == ["Linear", "Softmax (flash)", "Top-k, topk=25", "Top-k, topk=64", "stranger (x)"]


def test_labels_join_parameters_of_equal_value(tmp_path):
    cells = [synthetic.case("mita", {"landmarks": m, "topk": k}) for m, k in ((25, 25), (64, 128))]
    rows = table(tmp_path, [synthetic.ok(cell, 1e-3) for cell in cells])
    assert sorted(series.labels(rows)) == ["MiTA, landmarks=64, topk=128", "MiTA, landmarks=topk=25"]


def test_labels_join_no_switches(tmp_path):
    cells = [synthetic.case("mita", {"causal": on, "legacy_cls_shift": on}) for on in (False, True)]
    rows = table(tmp_path, [synthetic.ok(cell, 1e-3) for cell in cells])
    assert "MiTA, causal=False, legacy_cls_shift=False" in set(series.labels(rows))


def test_captions_state_the_parameters_that_labels_leave_out(tmp_path):
    cells = [synthetic.case("mita", {"landmarks": m, "topk": 9}) for m in (25, 64)]
    assert series.settings(table(tmp_path, [synthetic.ok(cell, 1e-3) for cell in cells])) == "MiTA: topk=9. "


def test_groups_split_devices_and_conditions(tmp_path):
    cells = [synthetic.case("softmax", n=n, batch=b) for n in (64, 128) for b in (1, 8)]
    records = [synthetic.ok(cell, 1e-3) for cell in cells]
    table(tmp_path, records)
    both = table(tmp_path, records[:1], environment={"device": "Other GPU"})
    found = {g.place: len(g.rows) for g in series.groups(both)}
    assert found == {"other-gpu": 1, "test-gpu-80gb-b1": 2, "test-gpu-80gb-b8": 2}


def test_noise_pairs_are_the_same_cell_twice(tmp_path):
    first, again, other = synthetic.case("softmax"), synthetic.case("softmax", replicate=1), synthetic.case("softmax", n=64)
    records = [synthetic.ok(cell, t, spread=0) for cell, t in ((first, 1.0), (again, 1.02), (other, 5.0))]
    assert series.pairs(table(tmp_path, records), "forward") == [(1.0, 1.02)]
    assert series.noise(table(tmp_path, [])) == "28.6% over 1 A/A pair"  # t of one degree of freedom
    assert series.noise(table(tmp_path / "none", records[:1])) == ""


def test_current_keeps_one_row_a_cell(tmp_path):
    cell = synthetic.case("softmax")
    record = synthetic.ok(cell, 1.0, spread=0)
    rows = table(tmp_path, [record, synthetic.failed(synthetic.case("linear"), "oom")])
    newer = rows.iloc[[0]].assign(env_id="env1", started="2030", time_s=2.0)
    crashed = rows.iloc[[0]].assign(env_id="env2", started="2031", time_s=float("nan"), status="error")
    kept = frame.current(pd.concat([rows, newer, crashed], ignore_index=True))
    assert sorted(kept["status"]) == ["ok", "oom"]
    assert kept.loc[kept["status"] == "ok", "time_s"].tolist() == [2.0]


@given(st.lists(st.tuples(st.text("ab=, ", max_size=4), st.integers(0, 999)), max_size=8))
def test_natural_order_reads_numbers(parts):
    texts = [f"{word}{number}" for word, number in parts]
    same_word = [t for t in sorted(texts, key=series.natural) if t.startswith("a") and t[1:].isdigit()]
    assert [int(t[1:]) for t in same_word] == sorted(int(t[1:]) for t in same_word)
