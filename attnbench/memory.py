"""Memory of one call beyond its inputs: peak, output, saved for the backward pass, workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from attnbench.record import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Forward = Callable[[], Tensor]
    Backward = Callable[[Tensor], object]


def measure(forward: Forward, backward: Backward | None, input_bytes: int, device: str) -> Memory:
    """Measure one call of `forward`, and of `backward` on its output where given.

    The call must have been run before, so that nothing is compiled or cached for the first time.
    """
    peak, output, saved = (_cuda if device == "cuda" else _cpu)(forward, backward)
    source = "torch CUDA caching allocator" if device == "cuda" else "torch CPU allocator, as the profiler saw it"
    return Memory(peak, output, saved, max(0, peak - output - saved), input_bytes, source)


def _cuda(forward: Forward, backward: Backward | None) -> tuple[int, int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = forward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    size = _allocated(output)
    kept = backward(output) if backward else None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak, size, max(0, held - size) if backward else 0


def _cpu(forward: Forward, backward: Backward | None) -> tuple[int, int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
        output = forward()
    size = _allocated(output)
    held, peak = _walk(first)
    if backward is None:
        return peak, size, 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
        kept = backward(output)
    _, more = _walk(second)
    del kept
    return max(peak, held + more), size, max(0, held - size)


def _walk(run: profile) -> tuple[int, int]:
    """Bytes held at the end and at the peak, over the allocations and releases of a profiled region."""
    results: Any = run.profiler.kineto_results if run.profiler else None
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def _allocated(x: Tensor) -> int:
    return x.untyped_storage().nbytes()
