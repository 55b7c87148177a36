"""The figure of crossover lengths draws what `attnbench crossover` says, and nothing without a baseline."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import synthetic
from figures_support import captioned

from attnbench import crossover, frame
from attnbench.crossover import Answer
from attnbench.figures import crossover as drawn


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return frame.load(synthetic.write(tmp_path_factory.mktemp("results"), "speed", synthetic.speed()))[0]


def test_rows_are_the_answers_of_the_command(table: pd.DataFrame) -> None:
    rows = {(str(r["series"]), str(r["panel"])): r for r in drawn.data(table).to_dict("records")}
    found = crossover.find(table, "softmax@cudnn")
    assert set(rows) == {(one.series, one.mode) for one in found}
    assert {one.answer for one in found} >= {Answer.FROM, Answer.NEVER, Answer.BEYOND}
    for one in found:
        row = rows[one.series, one.mode]
        assert row["answer"] == one.answer
        if one.length:
            assert (row["low"], row["n"], row["high"]) == tuple(round(n) for n in one.length)
            assert row["low"] <= row["n"] <= row["high"]
        else:
            assert pd.isna(row["n"])


def test_the_figure_has_a_point_or_a_word_for_every_row(table: pd.DataFrame) -> None:
    figure, rows = drawn.build(table), drawn.data(table)
    assert figure is not None
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == list(dict.fromkeys(rows["series"]))
    first = int(table["n"].min())
    for axes in figure.axes:
        part = rows[rows["panel"] == axes.get_title()]
        crossed = part[part["answer"] == Answer.FROM]
        points = {tuple(xy) for line in axes.lines if line.get_marker() != "None" for xy in line.get_xydata()}
        assert points == {(max(first, n), names.index(name)) for n, name in zip(crossed["n"], crossed["series"], strict=True)}
        least = {round(t.xy[1]) for t in axes.texts if t.get_text() == "≤ 1k"}
        assert least == {names.index(name) for name in crossed.loc[crossed["n"] <= first, "series"]}
        words = {(names[round(t.get_position()[1])], t.get_text()) for t in axes.texts if not t.get_text().startswith("≤")}
        others = part[part["answer"] != Answer.FROM]
        assert words == set(zip(others["series"], others["answer"], strict=True))
    assert "faster than Softmax (cudnn) from N =" in {axes.get_xlabel() for axes in figure.axes}


def test_what_was_tried_and_not_timed_is_no_baseline(tmp_path: Path) -> None:
    cells = [synthetic.case(label, n=n) for label in ("softmax@cudnn", "softmax@flash", "linear") for n in (1024, 4096)]
    times = {"softmax@flash": 1e-9, "linear": 1e-6}
    records = [
        synthetic.ok(c, times[c.label] * (c.n if c.method == "linear" else c.n**2 * 2))
        if c.label in times
        else synthetic.failed(c, "unsupported")
        for c in cells
    ]
    rows = drawn.data(frame.load(synthetic.write(tmp_path, "speed", records))[0])
    assert set(rows["baseline"]) == {"Softmax (flash)"}
    assert rows.loc[rows["series"] == "Linear", "answer"].tolist() == [Answer.FROM]


def test_an_interval_without_an_end_is_drawn_to_the_edge(table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    found = crossover.find(table, "softmax@cudnn")
    open_ended = [replace(one, length=one.length._replace(high=float("inf"))) if one.length else one for one in found]
    monkeypatch.setattr(crossover, "find", lambda *_: open_ended)
    figure = drawn.build(table)
    assert figure is not None
    assert "Bars that go beyond the axis: " in captioned(figure)
    assert any("to beyond the range)" in str(one) for one in open_ended)


def test_conditions_are_not_mixed(tmp_path: Path) -> None:
    records = [synthetic.ok(synthetic.case(m, n=n, heads=h), 1e-3) for m in ("softmax", "linear") for n in (1024, 4096) for h in (4, 8)]
    with pytest.raises(ValueError, match="one group of conditions"):
        drawn.data(frame.load(synthetic.write(tmp_path, "speed", records))[0])


def test_without_a_baseline_or_a_second_length_there_is_no_figure(table: pd.DataFrame, tmp_path: Path) -> None:
    assert drawn.build(table[~table["label"].isin(drawn.BASELINES)]) is None
    assert drawn.build(table[table["n"] == 1024]) is None
    assert drawn.build(table[table["label"] == "softmax@cudnn"]) is None
    assert drawn.data(pd.DataFrame()).empty
