"""Crossover lengths: exact on curves whose crossing is known, each other answer told apart, and the committed records."""

import json
from pathlib import Path

import numpy as np
import pytest
import synthetic
from cli_support import answer, call

from attnbench import crossover, frame, series, stats
from attnbench.crossover import Answer
from attnbench.errors import UserError

RESULTS = Path(__file__).parent.parent / "results"
LENGTHS = (1024, 2048, 4096, 8192)
TRUE = 3000.0
"""where a method of linear time `TRUE * N` meets a baseline of time `N^2`: a straight line of log ratio against log N"""


def square(n):
    return 1e-9 * n * n


def line(n):
    return 1e-9 * TRUE * n


def sweep(label, time, lengths=LENGTHS, spread=0.0, seed=0, **rest):
    return [synthetic.ok(synthetic.case(label, n=n, **rest), time(n), int(1e9 * time(n)), spread=spread, seed=seed) for n in lengths]


def failures(label, status, lengths):
    return [synthetic.failed(synthetic.case(label, n=n), status) for n in lengths]


def find(tmp_path, *records, against="softmax", **rest):
    return crossover.find(frame.load(synthetic.write(tmp_path, "speed", [r for part in records for r in part]))[0], against, **rest)


@pytest.mark.parametrize("lengths", [(1024, 4096), LENGTHS, (256, 2048, 65536)])
@pytest.mark.parametrize("metric", ["latency", "peak_memory"])
def test_without_noise_the_length_is_exact(tmp_path, lengths, metric):
    (one,) = find(tmp_path, sweep("softmax", square, lengths), sweep("linear", line, lengths), metric=metric)
    assert one.answer is Answer.FROM
    assert one.length is not None
    assert one.length == pytest.approx([TRUE] * 3, rel=1e-4)
    assert one.ratio is not None
    assert one.ratio.value == pytest.approx(TRUE / lengths[-1], rel=1e-4)
    assert (one.shortest, one.longest) == (lengths[0], lengths[-1])


def test_the_noise_floor_widens_the_interval_by_as_much_as_the_curve_needs_to_leave_it(tmp_path):
    twice = [synthetic.ok(synthetic.case("softmax", n=n, replicate=1), 1.002 * square(n), spread=0) for n in LENGTHS]
    (one,) = find(tmp_path, sweep("softmax", square), sweep("linear", line), twice)
    noise = stats.floor([(1.0, 1.002)] * 3)
    assert noise is not None
    assert one.length == pytest.approx((TRUE / (1 + noise.relative), TRUE, TRUE * (1 + noise.relative)), rel=1e-4)


def test_the_interval_covers_the_true_length_as_often_as_it_says(tmp_path):
    found = []
    for seed in range(40):
        records = [*sweep("softmax", square, spread=0.1, seed=seed), *sweep("linear", line, spread=0.1, seed=seed + 1000)]
        found += find(tmp_path / str(seed), records)
    covered = [one.length.low <= TRUE <= one.length.high for one in found if one.length]
    assert len(covered) == 40
    assert np.mean(covered) >= 0.9
    assert np.median([one.length.high / one.length.low for one in found if one.length]) < 1.25, "and it is not all lengths"


def test_never_beyond_and_not_separable_are_three_answers(tmp_path):
    base = [*sweep("softmax", square, LENGTHS[:3]), *failures("softmax", "oom", LENGTHS[3:])]
    full = sweep("softmax@math", square)
    records = [
        *base, *full,
        *sweep("linear", lambda n: 2 * square(n)),
        *sweep("agent", square, spread=0.05),
        *sweep("topk", lambda n: 2 * square(n), LENGTHS[:2]), *failures("topk", "timeout", LENGTHS[2:3]),
        *failures("topk", "skipped", LENGTHS[3:]),
        *failures("moba", "unsupported", LENGTHS),
        *failures("nystromformer", "oom", LENGTHS),
    ]  # fmt: skip
    found = {one.series: one for one in find(tmp_path, records, against="softmax@math")}
    assert found["Linear"].answer is Answer.NEVER
    assert found["Agent"].answer is Answer.NOT_SEPARABLE
    assert found["Top-k"].answer is Answer.BEYOND
    assert found["Top-k"].note == "Top-k ran out of time at N=4096"
    assert found["Nystromformer"].answer is Answer.BEYOND
    assert found["MoBA"].answer is Answer.NOT_MEASURED
    assert "unsupported" in found["MoBA"].note
    assert all(one.length is None for name, one in found.items() if name != "Softmax")
    assert found["Linear"].ratio == pytest.approx([2.0] * 3)


def test_a_baseline_that_runs_out_of_memory_is_named(tmp_path):
    base = [*sweep("softmax", square, LENGTHS[:3]), *failures("softmax", "oom", LENGTHS[3:])]
    slow, fast = find(tmp_path, base, sweep("linear", lambda n: 2 * square(n)), sweep("agent", line))
    assert (slow.answer, slow.note) == (Answer.BEYOND, "Softmax ran out of memory at N=8192")
    assert (fast.answer, fast.note, fast.longest) == (Answer.FROM, "Softmax ran out of memory at N=8192", 4096)
    assert fast.length is not None
    assert fast.length.value == pytest.approx(TRUE, rel=1e-4)


def test_a_skipped_length_counts_as_what_it_was_skipped_for(tmp_path):
    skipped = synthetic.failed(synthetic.case("linear", n=8192), "skipped")
    skipped = type(skipped)(**{**vars(skipped), "reasons": ("oom at N = 4096",)})
    (one,) = find(tmp_path, sweep("softmax", square), sweep("linear", lambda n: 2 * square(n), LENGTHS[:2]), [skipped])
    assert (one.answer, one.note) == (Answer.BEYOND, "Linear ran out of memory at N=8192")


def test_wins_from_the_shortest_length_on_and_wins_that_are_lost(tmp_path):
    ahead, lost = find(
        tmp_path, sweep("softmax", square), sweep("linear", lambda n: square(n) / 2), sweep("topk", lambda n: n * square(n) / TRUE)
    )
    assert ahead.length == (1024, 1024, 1024) or ahead.length == pytest.approx([1024.0] * 3)
    assert "faster throughout, from N=1024 or less" in str(ahead)
    assert (lost.answer, lost.note) == (Answer.NEVER, "faster at N=1024, 2048 and slower again beyond")


def test_a_gap_is_interpolated_and_told(tmp_path):
    own = [*sweep("linear", line, (1024, 2048, 8192)), *failures("linear", "error", (4096,))]
    (one,) = find(tmp_path, sweep("softmax", square), own)
    assert one.length is not None
    assert one.length.value == pytest.approx(TRUE, rel=1e-4)
    assert one.note == "not measured on both sides at N=4096"


def test_one_sample_separates_nothing(tmp_path):
    single = [synthetic.ok(synthetic.case("linear", n=n), line(n), spread=0, count=1) for n in LENGTHS]
    (one,) = find(tmp_path, sweep("softmax", square), single)
    assert one.answer is Answer.NOT_SEPARABLE
    assert one.as_dict()["ratio"]["high"] is None
    mixed = [*single[:3], *sweep("linear", line, LENGTHS[3:])]
    (one,) = find(tmp_path / "mixed", sweep("softmax", square), mixed)
    assert one.length is not None
    assert (one.length.low, one.length.high) == (pytest.approx(1024), pytest.approx(8192)), "known at the longest length alone"


def test_devices_modes_conditions_and_causality_are_kept_apart(tmp_path):
    for device, factor in (("GPU A", 1), ("GPU B", 0.5)):
        records = [
            *sweep("softmax", square),
            *sweep("linear", lambda n, f=factor: f * line(n)),
            *sweep("softmax", square, params={"causal": True}),
            *sweep("linear", lambda n, f=factor: 2 * f * line(n), params={"causal": True}),
        ]
        synthetic.write(tmp_path, "speed", records, {"device": device})
    found = crossover.find(frame.load(tmp_path)[0], "softmax")
    lengths = {(one.device, one.series): one.length.value for one in found if one.length}
    assert len(found) == len(lengths) == 4
    assert {one.conditions.partition(", dtype")[0] for one in found} == {"B=1, H=16, D=64"}, "no head counts or widths that nobody set"
    assert lengths["GPU A", "Linear, causal=False"] == pytest.approx(TRUE, rel=1e-4)
    assert lengths["GPU B", "Linear, causal=False"] == pytest.approx(TRUE / 2, rel=1e-4)
    assert lengths["GPU A", "Linear, causal=True"] == pytest.approx(2 * TRUE, rel=1e-4)


def test_mistakes_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="'softmaks' in these results: did you mean softmax"):
        find(tmp_path, sweep("softmax", square), against="softmaks")
    with pytest.raises(UserError, match="unknown metric"):
        find(tmp_path, metric="rel_error")
    with pytest.raises(UserError, match="unknown mode"):
        find(tmp_path, mode="backward")
    with pytest.raises(UserError, match="no other method was measured beside softmax"):
        find(tmp_path)
    with pytest.raises(UserError, match="no speed records"):
        crossover.find(frame.load(synthetic.write(tmp_path / "f", "fidelity", synthetic.fidelity((1024,))))[0], "softmax")


def test_the_committed_records_answer_for_every_series():
    table = frame.current(frame.load(RESULTS)[0])
    table = table[(table["task"] == "speed") & (table["suite"] == "speed")]
    rows = answer("crossover", str(RESULTS / "speed"), "--against", "softmax@cudnn", "--json")
    asked = table[(table["label"] != "softmax@cudnn") & (table["replicate"] == 0)].assign(series=series.labels)
    assert {(row["series"], row["mode"]) for row in rows} == set(zip(asked["series"], asked["mode"], strict=True))
    assert {"from", "never in range"} <= {row["answer"] for row in rows}
    for row in rows:
        assert (row["length"] is None) == (row["answer"] != "from")
        if row["length"]:
            assert row["shortest"] <= row["length"]["low"] * 1.001
            assert row["length"]["low"] <= row["length"]["value"] <= row["length"]["high"] <= row["longest"] * 1.001
            assert row["ratio"]["high"] < 1
    (mita,) = [row for row in rows if row["mode"] == "forward" and row["series"].startswith("MiTA")]
    at = table[(table["label"].isin(["mita", "softmax@cudnn"])) & (table["mode"] == "forward") & (table["replicate"] == 0)]
    times = at.pivot_table(index="n", columns="label", values="time_s")
    behind = times.index[times["mita"] >= times["softmax@cudnn"]]
    low, high = behind.max(), times.index[times.index > behind.max()].min()
    assert low <= mita["length"]["value"] <= high, "between the last loss by medians and the next length"


def test_the_command_prints_a_line_a_series_and_filters(tmp_path):
    folder = synthetic.write(
        tmp_path, "speed", [*sweep("softmax", square), *sweep("linear", line), *sweep("linear", line, mode="forward+backward")]
    )
    text = call("crossover", str(folder), "--against", "softmax", "--mode", "forward").stdout
    assert "speed, Test GPU 80GB, against Softmax" in text
    assert "Linear, forward: faster from N=3000; 0.366211 of Softmax at N=8192" in text
    assert "forward+backward" not in text
    assert json.loads(call("crossover", str(folder), "--against", "softmax", "--json").stdout)[0]["answer"] == "from"
    wrong = call("crossover", str(folder), "--against", "softmax", "--metric", "speed")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
