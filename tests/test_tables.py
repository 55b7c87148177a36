"""The report's cells and its two formats."""

import re

import pytest
import synthetic

from attnbench import frame, tables, typeset
from attnbench.typeset import ABOUT, NONE, TIMES, Table

SUBSET = (1024, 32768, 262144)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    synthetic.write(folder, "speed", synthetic.speed(SUBSET))
    return frame.load(synthetic.write(folder, "fidelity", synthetic.fidelity((1024,))))[0]


@pytest.fixture(scope="module")
def report(loaded):
    return {t.name: t for t in tables.report(loaded)}


def cell(table, row, column):
    line = next(r for r in table.rows if r[0] == row)
    return line[next(i for i, name in enumerate(table.header) if name.startswith(column))]


def test_one_table_a_mode_and_one_for_fidelity(report):
    assert list(report) == ["speed-test-gpu-80gb-forward", "speed-test-gpu-80gb-forward-backward", "fidelity-test-gpu-80gb"]


def test_cells_hold_time_spread_and_speed_up(report, loaded):
    forward = report["speed-test-gpu-80gb-forward"]
    rows = loaded[(loaded["n"] == 262144) & (loaded["mode"] == "forward") & (loaded["replicate"] == 0) & (loaded["status"] == "ok")]
    times = rows[rows["task"] == "speed"].set_index("label")["time_s"]
    assert cell(forward, "FlashAttention", "N=262144").endswith(f" 1{TIMES}")
    shown = re.fullmatch(rf"(\S+) \[\S+\] (\S+){TIMES}", cell(forward, "Linear", "N=262144"))
    assert shown is not None
    assert float(shown[1]) == pytest.approx(times["linear"] * 1e3, rel=0.01)
    assert float(shown[2]) == pytest.approx(times["flash_attn"] / times["linear"], rel=0.01)


def test_failures_are_words(report):
    forward, both = report["speed-test-gpu-80gb-forward"], report["speed-test-gpu-80gb-forward-backward"]
    assert cell(forward, "Softmax (math)", "N=32768") == "oom"
    assert cell(forward, "Softmax (math)", "N=262144") == "skipped"
    assert cell(forward, "xFormers", "peak memory") == "error"
    assert cell(both, "Sliding window", "N=1024") == "unsupported"
    assert cell(forward, "Sliding window", "error, randn") == NONE


def test_fidelity_joins_on_method_and_parameters(report):
    forward = report["speed-test-gpu-80gb-forward"]
    assert cell(forward, "MiTA", "error, randn") == "0.4"
    assert cell(report["fidelity-test-gpu-80gb"], "MiTA, landmarks=topk=25", "randn") == "0.55 [35%]"


def test_inseparable_speed_ups_are_marked(tmp_path):
    records = [synthetic.ok(synthetic.case(label), 1e-3, spread=0.02) for label in ("softmax", "linear", "topk")]
    (table,) = tables.report(frame.load(synthetic.write(tmp_path, "s", records))[0])
    assert cell(table, "Top-k", "N=1024").split()[-1].startswith(ABOUT)


def test_captions_state_the_conditions(report):
    caption = report["speed-test-gpu-80gb-forward"].caption
    for part in ("Test GPU 80GB", "B=1", "H=16", "D=64", "bfloat16", "L2 cold", "forward.", "MiTA: landmarks=64, topk=64", "3 A/A pairs"):
        assert part in caption


def test_the_first_caption_with_a_noise_floor_says_what_that_is(report, tmp_path):
    told = [name for name, table in report.items() if "The noise floor is how far apart" in table.caption]
    assert told == ["speed-test-gpu-80gb-forward"]
    records = [synthetic.ok(synthetic.case(label), 1e-3) for label in ("softmax", "linear")]
    (unknown,) = tables.report(frame.load(synthetic.write(tmp_path, "s", records))[0])
    assert "noise floor not measured" in unknown.caption
    assert "The noise floor is" not in unknown.caption


def test_lengths_limit_the_columns(loaded):
    header = tables.report(loaded, [1024])[0].header
    assert [h for h in header if h.startswith("N=")] == ["N=1024 (ms)"]


def test_markdown_has_as_many_cells_in_every_line(report):
    for table in report.values():
        lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {len(table.header) + 1}
        assert len(lines) == len(table.rows) + 2


def test_latex_escapes_and_balances():
    table = Table("t", r"100% of a_b & #1 {x} \ ~^", ("m", "f", "N"), (("a_b", "c&d", f"1{TIMES}"), ("$", "<", NONE)))
    text = table.latex()
    assert r"a\_b & c\&d & 1$\times$ \\" in text
    assert r"\caption{100\% of a\_b \& \#1 \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}}" in text
    assert r"\begin{tabular}{llr}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert text.isascii()


@pytest.mark.parametrize(
    ("value", "text"), [(0.05814, "0.0581"), (0.9996, "1.00"), (2110.4, "2110"), (12.34, "12.3"), (0.0, "0"), (99.96, "100")]
)
def test_significant_figures(value, text):
    assert typeset.figures(value) == text


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="html"):
        typeset.render([], "html")
