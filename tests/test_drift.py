"""Drift of cells that were measured again later."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import synthetic
from cli_support import answer, call

from attnbench import drift, frame
from attnbench.stats import Verdict

RESULTS = Path(__file__).parent.parent / "results"
MORNING, EVENING, LATER = "2026-01-01T08:00:00+00:00", "2026-01-01T20:00:00+00:00", "2026-01-03T08:00:00+00:00"


def at(time, started, label="softmax", *, n=1024, commit="a", env="env0", **rest):
    record = synthetic.ok(synthetic.case(label, n=n, **rest), time, spread=0.002)
    return replace(record, started=started, commit=commit, env_id=env)


def attempts(folder, *records):
    return frame.load(synthetic.write(folder, "speed", records), attempts=True)[0]


def test_first_and_last_attempt_of_a_cell_are_compared(tmp_path):
    table = attempts(tmp_path, at(1e-3, MORNING), at(5e-3, EVENING), at(2e-3, LATER, commit="b"), at(1e-3, MORNING, n=2048))
    (one,) = drift.find(table)
    assert (one.hours, one.attempts, one.commits, one.verdict) == (48, 3, ("a", "b"), Verdict.SLOWER)
    assert one.ratio.value == pytest.approx(2, rel=0.01)
    assert one.apart == pytest.approx(1, rel=0.02)
    assert "1 cell was measured again in the same environment, 48.0 to 48.0 hours later" in drift.summary([one])
    assert "1 beyond the A/A noise floor, furthest 100% (Softmax, forward, N=1024); 1 ran another commit" in drift.summary([one])
    assert "slower 48.0 hours later (last/first 2.00" in str(one)


def test_other_environments_cells_and_failures_are_no_drift(tmp_path):
    failed = replace(synthetic.failed(synthetic.case("softmax"), "oom"), started=EVENING)
    table = attempts(tmp_path, at(1e-3, MORNING), at(2e-3, EVENING, env="env1"), at(2e-3, EVENING, replicate=1), failed)
    assert drift.find(table) == []
    assert drift.summary([]) == ""
    assert drift.find(table.iloc[:0]) == []


def test_small_drift_is_within_the_noise_floor_and_the_furthest_comes_first(tmp_path):
    table = attempts(
        tmp_path, at(1e-3, MORNING), at(1.05e-3, MORNING, replicate=1), at(1.1e-3, EVENING), at(1e-3, MORNING, "linear"),
        at(9e-3, EVENING, "linear"),
    )  # fmt: skip
    far, near = drift.find(table)
    assert (far.series, far.verdict) == ("Linear", Verdict.SLOWER)
    assert (near.series, near.verdict) == ("Softmax", Verdict.NOT_SEPARABLE)


def test_an_attempt_that_two_results_share_counts_once(tmp_path):
    table = attempts(tmp_path / "a", at(1e-3, MORNING))
    more = attempts(tmp_path / "b", at(1e-3, MORNING), at(1e-3, EVENING))
    (one,) = drift.find(pd.concat([table, more], ignore_index=True))
    assert one.attempts == 2


def test_compare_tells_of_drift_and_lists_it(tmp_path):
    synthetic.write(tmp_path / "a", "speed", [at(1e-3, MORNING), at(1e-3, MORNING, "linear")])
    synthetic.write(tmp_path / "b", "speed", [at(2e-3, EVENING)])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    plain = call("compare", a, b)
    assert "drift: 1 cell was measured again" in plain.stderr
    assert "drift" not in plain.stdout
    (one,) = answer("compare", a, b, "--drift", "--json")
    assert (one["series"], one["hours"], one["verdict"]) == ("Softmax", 12, "slower")
    assert call("compare", "linear", "softmax", "--results", a).stderr == ""
    assert "12.0 hours later" in call("compare", a, b, "--drift").stdout


def test_the_committed_records_hold_drift_if_a_cell_was_measured_twice():
    table = frame.load(RESULTS, attempts=True)[0]
    timed = table[(table["status"] == "ok") & table["time_s"].notna()]
    twice = timed.groupby(["suite", "device", "env_id", "case_id"])["started"].nunique()
    found = drift.find(table)
    assert len(found) == int((twice > 1).sum())
    assert all(one.hours > 0 for one in found)
