"""Cost anatomy: which stage of a call its time goes to, seen by a profiler in a process of its own once the clocks are done.

What a whole call takes beyond the sum of its stages is the host: launches, and waiting for them. A profiler slows the host down, not the
kernels of a GPU; on a CPU, where operators are the work, it makes many small ones look slower than they are.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from attnbench import cell, inputs, timing, trace
from attnbench.cell import Bound
from attnbench.cost import Work
from attnbench.errors import raised
from attnbench.isolate import Reply
from attnbench.record import Breakdown
from attnbench.stages import GRADIENT, home, marking, rank
from attnbench.stats import median

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from attnbench.cost import Cost
    from attnbench.protocol import Protocol
    from attnbench.record import Record

MOST_CALLS = 10
SOURCES = {"cuda": "kernels, copies and fills on the device", "cpu": "operators, without the time of those they call"}
"""Device -> whose time it is."""


@dataclass(frozen=True)
class Anatomist:
    """Takes cells apart that another process has measured."""

    device: str
    protocol: Protocol
    drawn: inputs.Drawn

    def __call__(self, record: Record) -> Reply:
        """The `Breakdown` of a measured cell, or why there is none, as text."""
        try:
            parts = self.take(record)
            gc.collect()
        except Exception as error:  # an implementation may raise anything, and the measurement stands
            return Reply(raised(error), reusable=False)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return Reply(parts if parts.stages_s else "the profiler saw nothing run")

    def take(self, record: Record) -> Breakdown:
        """As many calls as the budget holds, at least 1 and at most 10, as cold as the timed ones and as often warmed up."""
        assert record.timing is not None, "the cell was measured"
        case, (method, params) = record.case, record.case.resolve()
        implementation, dtype, backward = method.implementation(record.implementation), getattr(torch, case.dtype), case.mode != "forward"
        tensors, _ = self.drawn(case.profile, case.shape, case.seed, dtype, self.device)
        weights = method.initial(case.shape, params, tensors[0], case.seed)
        bound = Bound.of(method, implementation, params, tensors, weights, backward=backward)
        for _ in range(2):
            bound()
        flush = timing.flusher(self.device) if case.l2 == "cold" else None
        parts = measure(
            bound.forward,
            bound.backward if backward else None,
            device=self.device,
            calls=max(1, min(MOST_CALLS, int(self.protocol.budget_s / max(median(record.timing.samples_s), 1e-9)))),
            kernels=implementation.stages,
            prepare=flush.zero_ if flush is not None else lambda: None,
        )
        work = needs(method.cost(case.shape, params), dtype.itemsize, case.mode, parts.stages_s)
        return replace(parts, flops={s: w.flops for s, w in work.items()}, bytes={s: w.bytes for s, w in work.items()})


def setup(device: str, protocol: Protocol, plugins: tuple[Path, ...]) -> Anatomist:
    """Make a worker ready as one that measures is."""
    cell.setup(device, protocol, plugins)
    return Anatomist(device, protocol, inputs.Drawn.beside(device))


def measure(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], object] | None,
    *,
    device: str,
    calls: int,
    kernels: Mapping[str, Sequence[str]],
    prepare: Callable[[], object] = lambda: None,
) -> Breakdown:
    """Take `calls` calls apart, after one more that is not counted where there are several. They must have been run before.

    `kernels` maps stages to parts of kernel names; `prepare` runs before each call.
    """
    spare = int(calls > 1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as run, marking():
        for _ in range(calls + spare):
            prepare()
            _call(forward, backward, device)
    return summarise(trace.read(run), kernels, device, spare)


def _call(forward: Callable[[], Tensor], backward: Callable[[Tensor], object] | None, device: str) -> None:
    """One call between two synchronisations, with its passes marked."""
    if device == "cuda":
        torch.cuda.synchronize()
    with record_function(trace.CALL):
        with record_function(trace.FORWARD):
            output = forward()
        if backward is not None:
            with record_function(trace.BACKWARD):
                backward(output)
    if device == "cuda":
        torch.cuda.synchronize()


def summarise(events: Sequence[trace.Event], kernels: Mapping[str, Sequence[str]], device: str, skip: int = 0) -> Breakdown:
    """The breakdown of a trace, its first `skip` calls left out; medians over the others."""
    spans = sorted((e for e in events if e.name == trace.CALL and not e.on_device), key=lambda e: e.start)[skip:]
    pieces, waits = trace.pieces(events, kernels, device), [e.start for e in events if e.waits]
    calls = [[piece for piece in pieces if span.holds(piece.at)] for span in spans]
    sums = [_sums(call) for call in calls]
    stages = {s: median([one.get(s, 0.0) for one in sums]) for s in sorted({s for one in sums for s in one}, key=rank)}
    return Breakdown(
        stages_s=stages,
        total_s=sum(stages.values()),
        launches=round(median([float(len(call)) for call in calls])),
        kernels=len({piece.name for call in calls for piece in call}),
        synchronisations=round(median([float(sum(map(span.holds, waits))) for span in spans])) if device == "cuda" else None,
        calls=len(calls),
        source=SOURCES[device],
    )


def _sums(pieces: Iterable[trace.Piece]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for piece in pieces:
        sums[piece.stage] += piece.seconds
    return dict(sums)


def needs(cost: Cost, element_size: int, mode: str, measured: Collection[str]) -> dict[str, Work]:
    """What a cost model counts, brought to the stages that were measured; see `attnbench.stages.home`.

    Where the gradients of a stage are made in kernels of another, their FLOP are added there and their traffic is not: q, once read, serves
    both. A backward pass that is not told apart has the compulsory traffic of `Cost.bytes`.
    """
    found: dict[str, Work] = defaultdict(lambda: Work(0, 0))
    for counted, work in cost.by_stage(element_size).items():
        found[home(counted, measured)] += work
    if mode == "forward":
        return dict(found)
    for counted, work in cost.gradients(element_size).items():
        target = home(counted + GRADIENT, measured)
        own = target == home(counted, measured) + GRADIENT
        found[target] += work if own else Work(work.flops, 0)
    if not any(s.endswith(GRADIENT) for s in measured):
        found["backward"] += Work(0, cost.bytes(element_size, mode) - cost.bytes(element_size))
    return dict(found)
