"""Plots of the page with a row a method: one length, crossovers, equal width without clocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import synthetic
from page_support import plots_of

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = [1024, 16384, 262144]


def test_a_single_length_is_a_row_a_method_the_best_first(tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    times = {"linear": 1e-3, "softmax@flash": 4e-3, "topk": 2e-3}
    records = [*(synthetic.ok(synthetic.case(m), t) for m, t in times.items()), synthetic.failed(synthetic.case("softmax@math"), "oom")]
    synthetic.write(tmp_path, "speed", records)
    plots = plots_of(tmp_path)
    latency = next(text for caption, text in plots.items() if caption.startswith("latency, forward, N="))
    assert '"factors":["Softmax (math)","Softmax (flash)","Top-k","Linear"]' in latency, "from below"
    assert '"out of memory"' in latency


def test_crossovers_and_equal_width_without_clocks_are_rows_too(tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    cell = synthetic.case("mita", {"landmarks": 32, "topk": 32}, task="fidelity")
    wide = [("softmax", {}, 1e-3, ()), ("linear", {}, 0.9, ()), ("mita", {"landmarks": 32, "topk": 32}, 0.5, (64,)),
            ("mita", {"landmarks": 64, "topk": 64}, 0.25, (128,))]  # fmt: skip
    records = [
        replace(
            synthetic.ok(replace(cell, method=m, params=tuple(p.items())), 1.0, metrics={"rel_error": e, "width": 64.0}, budget=b),
            timing=None,
        )
        for m, p, e, b in wide
    ]
    synthetic.write(tmp_path, "equal-width", records)
    synthetic.write(tmp_path, "speed", synthetic.speed(LENGTHS))
    plots = plots_of(tmp_path)
    width = next(text for caption, text in plots.items() if caption.startswith("equal width, randn, N="))
    assert '"factors":["Linear","MiTA"]' in width, "the closest at the top, and no exact method"
    assert '"128 units"' in width
    crossing = next(text for caption, text in plots.items() if caption == "crossover, forward")
    assert "faster than Softmax (cudnn) from N =" in crossing
    assert '"never in range"' in crossing
