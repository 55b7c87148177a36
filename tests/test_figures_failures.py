"""Figures of failed cells: no line through one, no average without one, and no file of nothing else."""

import pandas as pd
import pytest
import synthetic
from figures_support import axes_with_lines

from attnbench import figures, frame
from attnbench.errors import UserError
from attnbench.figures import latency


def test_no_line_is_drawn_through_a_failure(tmp_path):
    cells = [synthetic.case("softmax", n=n) for n in (128, 256, 512, 1024, 2048)]
    records = [synthetic.failed(c, "timeout") if c.n == 512 else synthetic.ok(c, 1e-3) for c in cells]
    figure = latency.build(frame.load(synthetic.write(tmp_path, "s", records))[0])
    assert figure is not None
    assert sorted(tuple(line.get_xdata()) for line in axes_with_lines(figure)[0].lines) == [(128, 256), (1024, 2048)]


def test_unequal_survivors_are_never_averaged(tmp_path):
    cells = [synthetic.case("topk", task="fidelity", n=128, seed=s) for s in (0, 1, 2)]
    good = [synthetic.ok(c, 1e-3, metrics={"rel_error": 0.1 * (c.seed + 1)}) for c in cells]
    module = figures.modules()["fidelity"]
    whole = module.data(frame.load(synthetic.write(tmp_path / "a", "f", good))[0])
    assert whole[["value", "low", "high"]].to_numpy().tolist() == [pytest.approx([0.2, 0.1, 0.3])]
    other = synthetic.ok(synthetic.case("linear", task="fidelity", n=128), 1e-3, metrics={"rel_error": 0.5})
    torn = module.data(frame.load(synthetic.write(tmp_path / "b", "f", [*good[:2], synthetic.failed(cells[2], "oom"), other]))[0])
    topk = torn[torn["method"] == "topk"]
    assert topk["status"].tolist() == ["oom"]
    assert topk["value"].isna().all()


def test_nothing_measured_is_said(tmp_path):
    table = frame.load(synthetic.write(tmp_path, "s", [synthetic.failed(synthetic.case("softmax"), "oom")]))[0]
    with pytest.raises(UserError, match="nothing to draw"):
        figures.draw_all(table, tmp_path / "f")
    with pytest.raises(UserError, match="nothing to draw"):
        figures.draw_all(pd.DataFrame(), tmp_path / "f")
