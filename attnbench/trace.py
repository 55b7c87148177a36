"""A profiler's trace, read as pieces of time that each belong to a stage.

A piece is a kernel, copy or fill on a GPU, or an operator on a CPU without those it calls. It belongs to the stage whose kernel names it
matches, else to the innermost mark (`attnbench.stages.stage`) around the operator that launched it, else to `backward` or `other` by
the pass it is in: nothing is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnbench.stages import GRADIENT, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch.profiler import profile

    Kernels = Mapping[str, Sequence[str]]

CALL, FORWARD, BACKWARD = (f"attnbench {name}" for name in ("call", "forward pass", "backward pass"))
"""The profiler's names of a whole call and its passes."""

_RUNTIME = re.compile(r"cu(da)?[A-Z]\w+$")
_WAITS = re.compile(r"cu(da)?\w*Synchronize(_ptsz)?$|cudaMemcpy$|cuMemcpyDtoH(_v2)?$")
_DEVICE_KINDS = ("", "kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Event:
    """One interval of a trace: an operator, a mark, a call of the CUDA runtime, or work on the device."""

    name: str
    start: int
    """ns"""
    end: int
    thread: int = 0
    on_device: bool = False
    id: int = 0
    """of an operator; the same of work on the device and the runtime's call that launched it; 0 where unknown"""
    launcher: int = 0
    """id of the operator that launched work on the device, 0 where unknown"""
    stage: str = field(default="", init=False)
    """innermost mark around an event of the host"""
    own: int = field(default=0, init=False)
    """ns without the events inside"""

    @property
    def marks(self) -> bool:
        """Whether it is one of ours, not work."""
        return self.name.startswith((PREFIX, CALL, FORWARD, BACKWARD))

    @property
    def waits(self) -> bool:
        """Whether the host waits here for the device; a copy to the host counts by the wait that follows it."""
        return not self.on_device and bool(_WAITS.match(self.name))

    def holds(self, when: int) -> bool:
        """Whether it is under way at `when`."""
        return self.start <= when < self.end


@dataclass(frozen=True)
class Piece:
    """A share of a call's time."""

    at: int
    """ns, when it was launched"""
    name: str
    """of the kernel or operator"""
    stage: str
    seconds: float


def read(run: profile) -> list[Event]:
    """The events of a finished profile."""
    results: Any = run.profiler.kineto_results if run.profiler else None
    return [_event(e) for e in results.events() if _wanted(e)]


def _wanted(event: Any) -> bool:
    """Work on the host or the device; not the marks that the profiler repeats on the device's own line."""
    if getattr(event, "is_hidden_event", bool)():
        return False
    if event.device_type().name == "CPU":
        return True
    kind = event.activity_type() if hasattr(event, "activity_type") else ""
    return kind in _DEVICE_KINDS and not event.is_user_annotation()


def _event(event: Any) -> Event:
    device, start = event.device_type().name != "CPU", event.start_ns()
    ids = event.correlation_id(), event.linked_correlation_id()
    return Event(event.name(), start, start + event.duration_ns(), event.start_thread_id(), device, *ids)


def settle(host: Iterable[Event]) -> None:
    """Give each event of the host the innermost mark around it, and its own time."""
    under_way: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(host, key=lambda e: (e.start, -e.end)):
        stack = under_way[event.thread]
        while stack and stack[-1].end <= event.start:
            stack.pop()
        event.own = event.end - event.start
        if stack:
            event.stage = stack[-1].stage
            stack[-1].own -= event.own
        if event.name.startswith(PREFIX):
            event.stage = event.name.removeprefix(PREFIX)
        stack.append(event)


def pieces(events: Sequence[Event], kernels: Kernels, device: str) -> list[Piece]:
    """All pieces of a trace. `kernels` maps stages to parts of kernel names."""
    host = [e for e in events if not e.on_device]
    settle(host)
    passes = [e for e in host if e.name == BACKWARD]
    operators = ((e.start, e.name, e.stage, e.own) for e in host if not e.marks)
    found = operators if device == "cpu" else _device_pieces(events, host)
    return [Piece(at, name, _stage(name, mark, at, kernels, passes), ns / 1e9) for at, name, mark, ns in found]


def _device_pieces(events: Iterable[Event], host: Sequence[Event]) -> Iterator[tuple[int, str, str, int]]:
    """(when launched, name, mark there, ns) of all work on the device."""
    operators = {e.id: e for e in host if e.id and not e.marks and not _RUNTIME.match(e.name)}
    launches = {e.id: e for e in host if e.id and _RUNTIME.match(e.name)}
    for work in events:
        if work.on_device and not work.marks:
            at, mark = _launched(work, operators.get(work.launcher), launches.get(work.id), host)
            yield at, work.name, mark, work.end - work.start


def _launched(work: Event, operator: Event | None, launch: Event | None, host: Iterable[Event]) -> tuple[int, str]:
    """When it was launched and the innermost mark there: by its operator, else by the runtime's call, else by its own time.

    Work of which neither is known counts for the call that was last begun.
    """
    if operator is not None:
        return operator.start, operator.stage
    at = launch.start if launch else work.start
    around = [e for e in host if e.name.startswith(PREFIX) and e.holds(at)]
    mark = min(around, key=lambda e: e.end - e.start).stage if around else ""
    begun = [e.end for e in host if e.name == CALL and e.start <= at]
    return (at if launch or not begun else min(at, max(begun) - 1)), mark


def _stage(name: str, mark: str, at: int, kernels: Kernels, passes: Iterable[Event]) -> str:
    """The stage whose part of `name` is longest, else the mark around the launch, else what the pass says.

    Marks inside a backward pass count only where they say so themselves: code that both passes share is marked once, for the forward pass.
    """
    matches = [(len(part), stage) for stage, parts in kernels.items() for part in parts if part in name]
    if matches:
        return max(matches)[1]
    if any(p.holds(at) for p in passes) and not mark.endswith(GRADIENT):
        return "backward"
    return mark or "other"
