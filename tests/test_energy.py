"""Energy of calls, on a GPU that is made up: its clock, its power, and a counter that ticks now and then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import synthetic
from figures_support import captioned

from attnbench import cell, energy, figures, frame, metrics, runner, store
from attnbench.energy import EnergyUnknownError, Meter
from attnbench.protocol import Protocol
from attnbench.record import Energy, Record, Status
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from pathlib import Path

IDLE_W, BUSY_W, CALL_S, TICK_S = 70.0, 470.0, 0.004, 0.1
NEEDED_J = (BUSY_W - IDLE_W) * CALL_S
"""what a call takes above idle"""


class NVMLError(Exception):
    """As pynvml raises."""


@dataclass
class Gpu:
    """Takes 70 W, and 470 W while it works off what was launched."""

    tick_s: float = TICK_S
    busy_w: float = BUSY_W
    t: float = 0.0
    spent_j: float = 1234.5
    queue_s: float = 0.0
    calls: int = 0

    def pass_time(self, seconds: float) -> None:
        """Time goes by; launched work is done first."""
        busy = min(seconds, self.queue_s)
        self.queue_s -= busy
        self.spent_j += busy * self.busy_w + (seconds - busy) * IDLE_W
        self.t += seconds
        if self.t // self.tick_s != (self.t - seconds) // self.tick_s:
            self.shown_mj = int(self.spent_j * 1e3)

    shown_mj: int = 1_234_500

    def call(self) -> None:
        self.calls += 1
        self.queue_s += CALL_S

    def synchronise(self) -> None:
        while self.queue_s > 1e-12:
            self.pass_time(min(self.queue_s, 0.001))

    def sleep(self, seconds: float) -> None:
        while seconds > 1e-12:
            step = min(seconds, 0.001)
            self.pass_time(step)
            seconds -= step

    def monitor(self, refuse: str = "") -> SimpleNamespace:
        """As `environment.Monitor`, with the real meaning of NVML's function: mJ since the driver was loaded."""

        def nvmlDeviceGetTotalEnergyConsumption(handle: str) -> int:  # noqa: N802 (NVML's name)
            assert handle == "gpu"
            if refuse:
                raise NVMLError(refuse)
            return self.shown_mj

        nvml = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=nvmlDeviceGetTotalEnergyConsumption)
        return SimpleNamespace(nvml=nvml, handle="gpu")

    def meter(self) -> Meter:
        """The meter of this GPU, on its own clock."""
        return replace(Meter.of(self.monitor()), synchronise=self.synchronise, now=lambda: self.t, sleep=self.sleep)


@pytest.mark.parametrize("tick_s", [0.02, 0.1])
def test_energy_above_idle_is_found_whatever_the_counter_s_pace(tick_s: float) -> None:
    gpu = Gpu(tick_s)
    found = energy.measure(gpu.call, gpu.meter(), CALL_S)
    assert found.calls == gpu.calls
    assert found.idle_w == pytest.approx(IDLE_W, rel=0.02)
    assert found.joules_per_call == pytest.approx(NEEDED_J, rel=0.02)
    assert found.window_s >= energy.WINDOW_S
    assert IDLE_W < found.mean_w <= BUSY_W
    assert "idle power subtracted" in found.source


def test_idle_power_is_measured_once_and_before_any_call() -> None:
    gpu = Gpu()
    meter = gpu.meter()
    first = energy.measure(gpu.call, meter, CALL_S)
    began = gpu.t
    again = energy.measure(gpu.call, meter, CALL_S)
    assert again.idle_w == first.idle_w
    assert gpu.t - began < energy.WINDOW_S + 3 * TICK_S


def test_calls_that_take_no_more_than_idle_have_no_energy() -> None:
    gpu = Gpu(busy_w=IDLE_W - 1)
    with pytest.raises(EnergyUnknownError, match="no more than the idle power of 70 W"):
        energy.measure(gpu.call, gpu.meter(), CALL_S)


def test_what_cannot_be_metered_says_why() -> None:
    with pytest.raises(EnergyUnknownError, match="only GPUs are metered"):
        Meter.of(None)
    with pytest.raises(EnergyUnknownError, match=r"install attnbench\[cuda\]"):
        Meter.of(SimpleNamespace(handle=None))
    with pytest.raises(EnergyUnknownError, match="does not report it: Not Supported"):
        Meter.of(Gpu().monitor("Not Supported"))
    with pytest.raises(EnergyUnknownError, match="stood still"):
        energy.measure(lambda: None, Gpu(tick_s=1e9).meter(), CALL_S)


def suite() -> Suite:
    axes = {"n": (16,), "heads": (1,), "dim": (8,)}
    return Suite("metered", "", "", "speed", (Entry("softmax@eager"),), axes, Protocol(budget_s=0.02, max_samples=4, aa=False, energy=True))


def test_a_cpu_has_no_energy_says_so_and_is_not_asked_again(tmp_path: Path) -> None:
    (asked,) = runner.sweep(suite(), tmp_path, device="cpu").records
    assert (asked.status, asked.energy, asked.reasons) == (Status.OK, None, ("no energy: only GPUs are metered",))
    again = runner.sweep(suite(), tmp_path, device="cpu", resume=True)
    assert (again.resumed, again.records) == (1, [])


def test_a_cell_is_metered_after_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    meter, measure = gpu.meter(), energy.measure
    monkeypatch.setattr(energy.Meter, "of", lambda _: meter)
    monkeypatch.setattr(energy, "measure", lambda call, meter, time_s: measure(lambda: (call(), gpu.call()), meter, max(time_s, CALL_S)))
    (case,) = suite().expand()
    record = cell.CellRunner("cpu", suite().protocol)(case).value
    assert record.energy.joules_per_call == pytest.approx(NEEDED_J, rel=0.05)
    assert Record.from_json(record.to_json()) == record


METERED = Energy(0.5, 70.0, 300.0, 100, 1.0, "test")


def test_records_hold_energy_only_where_they_were_measured() -> None:
    plain = synthetic.ok(synthetic.case("softmax"), 1e-3)
    assert '"energy"' not in plain.to_json(), "records without it are written as before"
    assert Record.from_json(plain.to_json()).energy is None
    assert Record.from_json(replace(plain, energy=METERED).to_json()).energy == METERED
    with pytest.raises(ValueError, match="may not hold measurements"):
        replace(synthetic.failed(synthetic.case("softmax"), "oom"), energy=METERED)


def test_energy_per_token_is_a_metric_and_a_figure(tmp_path: Path) -> None:
    records = [
        replace(synthetic.ok(synthetic.case("softmax", n=n, batch=2), 1e-3), energy=replace(METERED, joules_per_call=n * 1e-3))
        for n in (512, 1024)
    ]
    table = frame.load(synthetic.write(tmp_path, "speed", [*records, synthetic.ok(synthetic.case("linear", n=512, batch=2), 1e-3)]))[0]
    values = metrics.add(table).set_index(["label", "n"])["joules_per_token"]
    assert values["softmax", 512] == values["softmax", 1024] == pytest.approx(0.5e-3)
    assert values.isna()["linear", 512]
    drawn = figures.modules()["energy"].data(table)
    assert drawn["value"].tolist() == pytest.approx([0.5, 0.5]), "mJ a token"
    figure = figures.modules()["energy"].build(table)
    assert figure is not None
    assert "idle power of 70 W subtracted" in captioned(figure)


def test_results_without_energy_draw_no_figure_of_it(tmp_path: Path) -> None:
    table = frame.load(synthetic.write(tmp_path, "speed", [synthetic.ok(synthetic.case("softmax"), 1e-3)]))[0]
    assert figures.modules()["energy"].data(table).empty
    assert store.find(tmp_path)


def metered(label: str, n: int, joules: float | None, mode: str = "forward") -> Record:
    energy = None if joules is None else replace(METERED, joules_per_call=joules)
    return replace(synthetic.ok(synthetic.case(label, n=n, mode=mode), 1e-3), energy=energy)


def test_only_modes_and_lengths_at_which_energy_was_metered_are_drawn(tmp_path: Path) -> None:
    joules = {"softmax@flash": 4.0, "linear": 0.25, "topk": 1.0}
    records = [metered(label, n, j if n == 2048 else None) for label, j in joules.items() for n in (1024, 2048, 4096)]
    records += [metered(label, 2048, None, "forward+backward") for label in joules]
    failures = (("softmax@math", 2048, "forward"), ("softmax@math", 4096, "forward"), ("topk", 4096, "forward+backward"))
    records += [synthetic.failed(synthetic.case(label, n=n, mode=mode), "oom") for label, n, mode in failures]
    table = frame.load(synthetic.write(tmp_path, "speed", records))[0]
    module = figures.modules()["energy"]
    drawn = module.data(table)
    assert set(zip(drawn["panel"], drawn["n"], strict=True)) == {("forward", 2048)}
    assert drawn.loc[drawn["status"] != "ok", "label"].tolist() == ["softmax@math"], "failed where others were metered"
    assert drawn.set_index("label")["joules_per_call"].dropna().to_dict() == joules
    figure = module.build(table)
    assert figure is not None
    (axes,) = (a for a in figure.axes if a.get_xscale() == "log")
    assert axes.get_title() == "forward, N=2k"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["Linear", "Top-k", "Softmax (flash)", "Softmax (math)"]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() not in ("None", None)]
    assert points == [(pytest.approx(joules[k] / 2048 * 1e3), y) for y, k in enumerate(("linear", "topk", "softmax@flash"))]
    texts = [t.get_text() for t in axes.texts]
    assert texts == ["0.122", "0.250", "0.488", "1.00", "1.95", "4.00", "O", "J a call"], "mJ a token, J a call"


def test_energy_of_several_lengths_is_lines(tmp_path: Path) -> None:
    table = frame.load(synthetic.write(tmp_path, "speed", [metered("linear", n, n * 1e-3) for n in (512, 1024)]))[0]
    figure = figures.modules()["energy"].build(table)
    assert figure is not None
    assert [512.0, 1024.0] in [list(line.get_xdata()) for a in figure.axes for line in a.lines]


def test_a_later_attempt_without_energy_takes_none_away_and_figures_say_so(tmp_path: Path) -> None:
    case = synthetic.case("linear", n=512)
    first = replace(synthetic.ok(case, 2e-3), energy=METERED)
    other = replace(synthetic.ok(synthetic.case("softmax", n=512), 1e-3), energy=METERED)
    table = frame.load(synthetic.write(tmp_path, "speed", [first, other, synthetic.ok(case, 1e-3)]))[0]
    row = table.set_index("label").loc["linear"]
    assert (row["energy_j"], row["time_s"]) == (METERED.joules_per_call, pytest.approx(1e-3, rel=0.1)), "the time is the last one's"
    assert row["metered_s"] == pytest.approx(2e-3, rel=0.1)
    figure = figures.modules()["energy"].build(table)
    assert figure is not None
    assert "Metered in an earlier attempt than the last: 1 of 2 cells." in captioned(figure)
    swapped = replace(synthetic.ok(case, 1e-3), implementation="another")
    table = frame.load(synthetic.write(tmp_path / "b", "speed", [first, swapped]))[0]
    assert "energy_j" not in table, "another implementation ran since"
    each = frame.load(tmp_path, attempts=True)[0]
    assert each.loc[(each["label"] == "linear") & (each["suite"] == "speed"), "energy_j"].notna().sum() == 2
