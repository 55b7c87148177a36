"""Numbers of different GPU kinds are never pooled: not in a figure, not in a table, not in a noise floor."""

from dataclasses import replace

import pandas as pd
import pytest
import synthetic

from attnbench import figures, frame, series, tables
from attnbench.record import Breakdown, Energy

DEVICES = {"GPU A": 1.0, "GPU B": 3.0}
"""device -> how much slower it is"""

NAMES = (
    "anatomy",
    "crossover",
    "efficiency",
    "energy",
    "equal_width",
    "fidelity",
    "latency",
    "load",
    "memory",
    "pareto",
    "recall",
    "routing",
    "throughput",
)
"""Figures for which there are records here."""


def records(slower):
    """A small sweep of everything that is drawn, on a device so much slower."""
    found = []
    for label, params in (("softmax@flash", {}), ("mita", {"landmarks": 64, "topk": 64}), ("linear", {})):
        for n in (1024, 4096):
            time = slower * n * 1e-7 * (n / 1024 if label.startswith("softmax") else 2)
            parts = Breakdown({"attend": time / 2}, time / 2, 1, 1, 0, 3, "test", {"attend": 10**9}, {"attend": 10**6})
            metered = Energy(slower * n * 1e-4, 70.0, 300.0, 100, 1.0, "test")
            speed = synthetic.case(label, params, n=n)
            found += [
                synthetic.ok(speed, time, energy=metered, breakdown=parts, flops=10**9, bytes=10**6),
                synthetic.ok(replace(speed, replicate=1), time * 1.01),
                synthetic.ok(
                    replace(speed, task="fidelity", profile="needle"), time, budget=(64,) if params else (),
                    metrics={"rel_error": slower / 10, "width": 64.0, "mass_recalled": slower / 10},
                ),
                synthetic.ok(replace(speed, task="health", profile="skewed"), time, metrics={"max_load": slower / 10}),
            ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for device, slower in DEVICES.items():
        by_task = {task: [r for r in records(slower) if r.case.task == task] for task in ("speed", "fidelity", "health")}
        for suite, part in by_task.items():
            synthetic.write(folder, suite, part, {**synthetic.ENVIRONMENT, "device": device})
    return frame.load(folder)[0]


@pytest.mark.parametrize("name", sorted(figures.modules()))
def test_each_figure_is_of_one_device_and_holds_what_that_device_alone_would_give(name, loaded):
    module = figures.modules()[name]
    drawn = {(g.suite, g.place, g.rows["device"].iloc[0]): module.data(g.rows) for g in figures.parts(module, loaded)}
    assert all(g.rows["device"].nunique() == 1 for g in figures.parts(module, loaded))
    drawn = {key: data for key, data in drawn.items() if not data.empty}
    for device in DEVICES:
        alone = loaded[loaded["device"] == device]
        parts = [(g.suite, g.place, device) for g in figures.parts(module, alone) if not module.data(g.rows).empty]
        assert parts or name not in NAMES, f"{name} has nothing of {device}: give the records above what it draws"
        for group in figures.parts(module, alone):
            if (key := (group.suite, group.place, device)) in parts:
                pd.testing.assert_frame_equal(drawn.pop(key), module.data(group.rows))
    assert not drawn, "and nothing else is drawn"


@pytest.mark.parametrize("name", NAMES)
def test_no_figure_takes_rows_of_two_devices(name, loaded):
    with pytest.raises(ValueError, match="mixes devices"):
        figures.modules()[name].data(loaded)


def test_files_tables_and_noise_floors_are_of_one_device(loaded, tmp_path):
    speed = loaded[(loaded["task"] == "speed") & (loaded["n"] == 1024)]
    paths = figures.draw_all(speed, tmp_path)
    for path in paths:
        assert sum(device in path.name for device in ("gpu-a", "gpu-b")) == 1, path.name
    assert {p.name.replace("gpu-a", "gpu-b") for p in paths if "gpu-a" in p.name} == {p.name for p in paths if "gpu-b" in p.name}
    captions = [table.caption for table in tables.report(loaded)]
    assert all(("GPU A" in caption) != ("GPU B" in caption) for caption in captions)
    assert len(captions) == 6
    pairs = [pair for mode in ("forward", "forward+backward") for pair in series.pairs(loaded, mode)]
    assert len(pairs) == len(DEVICES) * 6
    assert all(max(pair) / min(pair) < 1.2 for pair in pairs), "no pair spans two devices, the slower of which takes three times as long"
