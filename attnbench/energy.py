"""Energy of a call: what a GPU's own counter says over many calls, less what the GPU takes while it idles.

NVML's total-energy counter (Volta and later) covers the whole GPU and ticks a few tens of times a second. So calls run back to back
from one tick to another about a second later, and the energy between the ticks is shared among them. The idle power that is taken off is
measured in the same process beforehand, with the context alive and nothing running.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnbench.record import Energy

if TYPE_CHECKING:
    from collections.abc import Callable

    from attnbench.environment import Monitor

WINDOW_S = 1.0
"""calls run for at least so long"""
_SETTLE_S = 2.0
"""rest before idle power is measured: a GPU that has just worked still holds its clocks up"""
_STANDSTILL_S = 2.0
"""a counter that does not move for so long counts nothing"""
_ROUND_S = 0.05
"""calls are launched for about so long at a time before the host waits for them"""
ABSENT = "no energy"
"""How the reason begins where a record has none."""
SOURCE = "NVML total energy of the whole GPU, calls back to back with a warm cache, idle power subtracted"


class EnergyUnknownError(Exception):
    """Says why there is no energy."""


@dataclass
class Meter:
    """Reads a counter of energy; everything that touches the machine can be replaced."""

    read_j: Callable[[], float]
    """joules since some time in the past"""
    synchronise: Callable[[], None]
    """waits until the GPU has nothing to do"""
    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    _idle_w: float | None = field(default=None, init=False)

    @classmethod
    def of(cls, monitor: Monitor | None) -> Meter:
        """The meter of the monitor's GPU. Raises `EnergyUnknownError` where it has no counter."""
        if monitor is None:
            raise EnergyUnknownError("only GPUs are metered")
        if monitor.handle is None:
            raise EnergyUnknownError("NVML cannot be read: install attnbench[cuda]")
        nvml, handle = monitor.nvml, monitor.handle

        def read_j() -> float:
            try:
                return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3  # the counter is in mJ
            except nvml.NVMLError as error:
                raise EnergyUnknownError(f"the GPU does not report it: {error}") from None

        read_j()
        return cls(read_j, torch.cuda.synchronize)

    def tick(self) -> tuple[float, float]:
        """Wait until the counter moves: the time in s, and the counter in J. Raises `EnergyUnknownError` where it stands still."""
        began, before = self.now(), self.read_j()
        while (value := self.read_j()) == before:
            if self.now() - began > _STANDSTILL_S:
                raise EnergyUnknownError(f"NVML's counter stood still for {_STANDSTILL_S:g} s")
            self.sleep(0.0005)
        return self.now(), value

    def idle_w(self) -> float:
        """Power with nothing running, in W; measured once."""
        if self._idle_w is None:
            self.synchronise()
            self.sleep(_SETTLE_S)
            start, before = self.tick()
            self.sleep(WINDOW_S)
            end, after = self.tick()
            self._idle_w = (after - before) / (end - start)
        return self._idle_w


def measure(call: Callable[[], Any], meter: Meter, time_s: float) -> Energy:
    """Energy of `call`, which takes about `time_s`. Raises `EnergyUnknownError`."""
    idle = meter.idle_w()
    together = max(1, round(_ROUND_S / time_s))
    meter.synchronise()
    start, before = meter.tick()
    calls = 0
    while meter.now() - start < WINDOW_S:
        for _ in range(together):
            call()
        meter.synchronise()
        calls += together
    end, after = meter.tick()
    spent = after - before - idle * (end - start)
    if spent <= 0:
        raise EnergyUnknownError(f"{calls} calls took no more than the idle power of {idle:.0f} W")
    return Energy(spent / calls, idle, (after - before) / (end - start), calls, end - start, SOURCE)
