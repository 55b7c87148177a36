"""The picture of the taxonomy: what is drawn where, and the numbers that colour and size tell."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from cli_support import call

import attnbench
from attnbench import frame, registry
from attnbench.errors import UserError
from attnbench.figures import _taxonomy
from attnbench.taxonomy import DIMENSIONS

RESULTS = Path(__file__).parent.parent / "results" / "speed"


def everything() -> list[attnbench.method.Method]:
    return [registry.get(name) for name in attnbench.methods()]


def test_every_method_stands_in_the_cell_of_its_coordinates() -> None:
    drawn = _taxonomy.data(everything(), "construction", "topology", {})
    assert set(drawn["method"]) == set(attnbench.methods())
    figure = _taxonomy.build(drawn.copy(), "construction", "topology")
    (axes,) = figure.axes
    columns = [str(v) for v in DIMENSIONS["construction"] if str(v) in set(drawn["construction"])]
    edges = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_ydata()) == 2]
    for text in axes.texts:
        for row in drawn[drawn["title"] == text.get_text()].to_dict("records"):
            left = sorted(edges)[columns.index(row["construction"])]
            assert left < text.get_position()[0] < left + 4
    heads = {text.get_text().replace("\n", " ") for text in axes.texts}
    assert set(columns) <= heads


def test_numbers_are_the_best_of_a_method_on_one_device() -> None:
    table, _ = frame.load(RESULTS)
    numbers = _taxonomy.measured(table, ["latency", "peak_memory"], 65536)
    rows = frame.current(table)
    rows = rows[(rows["status"] == "ok") & (rows["mode"] == "forward") & (rows["replicate"] == 0) & (rows["n"] == 65536)]
    softmax = rows.loc[rows["method"] == "softmax", "time_s"].min()
    assert numbers["latency"]["softmax"] == pytest.approx(softmax * 1e3)
    drawn = _taxonomy.data(everything(), "scaling", "expert", numbers)
    figure = _taxonomy.build(drawn.copy(), "scaling", "expert", colour="latency", size="peak_memory")
    sizes = {float(line.get_markersize()) for line in figure.axes[0].lines if line.get_linestyle() == "None"}
    assert {min(_taxonomy._SIZES), max(_taxonomy._SIZES)} <= sizes
    hollow = [line for line in figure.axes[0].lines if line.get_linestyle() == "None" and line.get_markerfacecolor() == "none"]
    assert len(hollow) == int(drawn["latency"].isna().sum())


def test_the_command_writes_the_picture_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    done = call("taxonomy", "--figure", tmp_path / "t", "--across", "scaling", "--scaling", "routing")
    assert done.exit_code == 0, done.stderr
    assert {p.suffix for p in tmp_path.iterdir()} == {".pdf", ".png", ".csv"}
    assert set(pd.read_csv(tmp_path / "t.csv")["scaling"]) == {"routing"}
    for words, complaint in (
        (("--across", "size"), "unknown dimension 'size'"),
        (("--across", "topology"), "both axes are topology"),
        (("--colour", "latency"), "need --results"),
        (("--colour", "speed", "--results", str(RESULTS)), "unknown metric 'speed'"),
        (("--colour", "latency", "--results", str(RESULTS), "--n", "7"), "hold no latency at N = 7"),
    ):
        failed = call("taxonomy", "--figure", tmp_path / "u", *words)
        assert failed.exit_code == 2
        assert complaint in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
    with pytest.raises(UserError, match="hold no latency"):
        _taxonomy.measured(pd.DataFrame(), ["latency"], 7)
