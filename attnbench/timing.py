"""Clocks: how long a call takes, with a cold cache, repeated until the noise is small enough."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnbench.record import Timing
from attnbench.stats import relative_half_width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attnbench.environment import Monitor
    from attnbench.protocol import Protocol

    Call = Callable[[], object]

_LEAST_SAMPLES = 3
_WALL_FACTOR = 4.0
"""a cell's sampling may take this many budgets of wall time, cache flushes included"""


class Clock(ABC):
    """Times single calls; `name` is what a record says of it."""

    name: str
    calls_per_sample = 1

    @abstractmethod
    def sample(self, count: int) -> list[float]:
        """Seconds of each of `count` calls."""


class CpuClock(Clock):
    """Wall time of calls on the CPU."""

    name = "cpu"

    def __init__(self, call: Call, *, cold: bool) -> None:
        self.call = call
        self.flush = flusher("cpu") if cold else None

    def sample(self, count: int) -> list[float]:
        """Seconds of each call."""
        return [self._one() for _ in range(count)]

    def _one(self) -> float:
        if self.flush is not None:
            self.flush.zero_()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


class CudaClock(Clock):
    """CUDA events around each call only; a flush before each call evicts the second-level cache and gives the host a head start."""

    name = "cuda-event"

    def __init__(self, call: Call, *, cold: bool) -> None:
        self.call = call
        self.flush = flusher("cuda") if cold else None

    def sample(self, count: int) -> list[float]:
        """Seconds of each call."""
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in pairs:
            if self.flush is not None:
                self.flush.zero_()
            start.record()
            self.call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class GraphClock(Clock):
    """Replays of one captured CUDA graph that holds a call on each of several copies of the inputs.

    Launch overhead is out of the number; the copies together outgrow the cache where it is to be cold.
    """

    name = "cuda-graph"

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls_per_sample = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [call() for call in calls]
        self.inner = CudaClock(self.graph.replay, cold=False)

    def sample(self, count: int) -> list[float]:
        """Seconds of one call, each the mean over a replay."""
        return [s / self.calls_per_sample for s in self.inner.sample(count)]


def flusher(device: str) -> torch.Tensor:
    """A buffer of twice the GPU's second-level cache, or the CPU's last level; writing it evicts everything else."""
    size = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else _last_level_cache()
    return torch.empty(2 * size, dtype=torch.int8, device=device)


def copies_to_outgrow_cache(input_bytes: int) -> int:
    """How many copies of the inputs together exceed twice the second-level cache."""
    return min(64, 1 + 2 * torch.cuda.get_device_properties(0).L2_cache_size // max(1, input_bytes))


def _last_level_cache() -> int:
    sizes = [16 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return min(max(sizes), 64 << 20)


def measure(clock: Clock, protocol: Protocol, first_call_s: float, monitor: Monitor | None = None) -> Timing:
    """Sample until the median's interval is narrow enough, or a budget is spent; keep every sample.

    At least three samples, at most `max_samples`, `budget_s` of timed calls and four budgets of wall time.
    """
    began = time.perf_counter()
    samples = clock.sample(_LEAST_SAMPLES)
    clocks: list[int] = []
    throttled = 0
    while not _enough(samples, clock, protocol, began):
        per_call = max(sum(samples) / len(samples) * clock.calls_per_sample, 1e-7)
        left = protocol.budget_s - sum(samples) * clock.calls_per_sample
        count = max(1, min(10, protocol.max_samples - len(samples), int(left / per_call)))
        samples += clock.sample(count)
        if monitor is not None:
            mhz, held_back = monitor.read()
            clocks += [mhz] if mhz else []
            throttled += count if held_back else 0
    return Timing(tuple(samples), first_call_s, clock.name, clock.calls_per_sample, throttled, tuple(clocks))


def _enough(samples: Sequence[float], clock: Clock, protocol: Protocol, began: float) -> bool:
    spent = sum(samples) * clock.calls_per_sample
    slow = time.perf_counter() - began > _WALL_FACTOR * protocol.budget_s
    settled = len(samples) >= 10 and relative_half_width(samples) <= protocol.half_width
    return settled or slow or spent >= protocol.budget_s or len(samples) >= protocol.max_samples
