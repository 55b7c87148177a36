"""A profiler's trace: what belongs to which stage, as a GPU's trace would have it, and that nothing is lost or counted twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import breakdown, trace
from attnbench.stages import PREFIX, rank
from attnbench.trace import BACKWARD, CALL, FORWARD, Event


def mark(name: str, start: int, end: int, thread: int = 1) -> Event:
    return Event(PREFIX + name, start, end, thread)


def kernel(name: str, start: int, ns: int, *, launcher: int = 0, id: int = 0) -> Event:
    return Event(name, start, start + ns, on_device=True, launcher=launcher, id=id)


def gpu_call(at: int, scale: int = 1) -> list[Event]:
    """A call as a GPU's trace shows it: the kernels run after the host has gone on, the backward pass on another thread."""
    host = [
        Event("aten::zero_", at - 40, at - 30, 1, id=at + 90),  # empties the cache before the call
        Event(CALL, at, at + 1000, 1), Event(FORWARD, at, at + 500, 1), Event(BACKWARD, at + 500, at + 1000, 1),
        Event("lib::op", at + 10, at + 90, 1, id=at + 1),
        mark("route", at + 100, at + 300),
        Event("aten::topk", at + 110, at + 200, 1, id=at + 2),
        mark("permute", at + 210, at + 290), Event("aten::sort", at + 220, at + 280, 1, id=at + 3),
        Event("cudaLaunchKernel", at + 320, at + 330, 7, id=at + 50),
        mark("gather", at + 340, at + 400), Event("cuLaunchKernelEx", at + 350, at + 360, 7, id=at + 51),
        Event("aten::item", at + 410, at + 480, 1, id=at + 4), Event("cudaMemcpyAsync", at + 420, at + 430, 7, id=at + 52),
        Event("cudaStreamSynchronize", at + 430, at + 470, 7),
        Event("XBackward", at + 600, at + 900, 2, id=at + 5),
        mark("attend", at + 610, at + 700, 2), Event("aten::bmm", at + 620, at + 690, 2, id=at + 6),
        mark("merge gradient", at + 710, at + 800, 2), Event("aten::mul", at + 720, at + 790, 2, id=at + 7),
        Event("cudaDeviceSynchronize", at + 1001, at + 5000, 7),  # ours, after the call
    ]  # fmt: skip
    device = [
        kernel("fill", at - 20, 15, launcher=at + 90),
        kernel("probe_kernel_0d1d", at + 1100, 10 * scale, launcher=at + 1),
        kernel("sum_probe_kernel", at + 1200, 20 * scale, launcher=at + 5),
        kernel("topk_radix", at + 1300, 30 * scale, launcher=at + 2),
        kernel("sort", at + 1400, 40 * scale, launcher=at + 3),
        kernel("unlinked", at + 1500, 50 * scale, id=at + 50),
        kernel("triton_poi", at + 1600, 60 * scale, id=at + 51),
        kernel("Memcpy DtoH", at + 1700, 70 * scale, launcher=at + 4, id=at + 52),
        kernel("bmm", at + 1800, 80 * scale, launcher=at + 6),
        kernel("mul", at + 1900, 90 * scale, launcher=at + 7),
        kernel("lost", at + 2000, 100 * scale),
        kernel("bmm", at + 2200, 110 * scale, launcher=at + 5),
    ]
    return host + device


NAMES = {"probe": ("probe_kernel",), "probe gradient": ("sum_probe_kernel",)}


def test_kernels_go_to_their_name_else_their_mark_else_their_pass() -> None:
    found = breakdown.summarise(gpu_call(10_000), NAMES, "cuda")
    want = {"probe": 10, "route": 30, "permute": 40, "gather": 60, "probe gradient": 20, "merge gradient": 90}
    assert {s: round(t * 1e9) for s, t in found.stages_s.items()} == {
        **want,
        "backward": 80 + 110 + 100,  # a mark of the forward pass does not count there; what nobody launched goes by its own time
        "other": 50 + 70,
    }
    assert list(found.stages_s) == sorted(found.stages_s, key=rank)
    assert found.total_s == pytest.approx(660e-9)
    assert (found.launches, found.kernels, found.synchronisations, found.calls) == (11, 10, 1, 1)


def test_the_first_call_is_left_out_and_the_others_give_medians() -> None:
    events = [e for i, scale in enumerate((50, 1, 2, 9)) for e in gpu_call(100_000 * (i + 1), scale)]
    found = breakdown.summarise(events, NAMES, "cuda", skip=1)
    assert round(found.stages_s["route"] * 1e9) == 60
    assert (found.launches, found.synchronisations, found.calls) == (11, 1, 3)


def test_a_trace_without_kernels_is_empty() -> None:
    host = [e for e in gpu_call(10_000) if not e.on_device]
    found = breakdown.summarise(host, {}, "cuda")
    assert (found.stages_s, found.total_s, found.launches, found.kernels) == ({}, 0, 0, 0)


intervals = st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400), st.integers(1, 3), st.booleans()), max_size=30)


@given(intervals)
def test_nested_times_add_up_and_none_is_counted_twice(drawn: list[tuple[int, int, int, bool]]) -> None:
    """Own times of a thread are the time during which it does anything, however operators and marks nest."""
    events: list[Event] = []
    for start, length, thread, marks in drawn:
        inside = [e for e in events if e.thread == thread and e.start <= start < e.end]
        end = min([start + length, *(e.end for e in inside)])
        if not any(e.thread == thread and start < e.start < end < e.end for e in events):
            events.append(mark("pool", start, end, thread) if marks else Event("op", start, end, thread))
    trace.settle(events)
    assert all(e.own >= 0 for e in events)
    for thread in (1, 2, 3):
        covered = set().union(*(range(e.start, e.end) for e in events if e.thread == thread))
        assert sum(e.own for e in events if e.thread == thread) == len(covered)


@given(st.lists(st.tuples(st.sampled_from(["a", "probe_kernel", "sum_probe_kernel"]), st.integers(1, 99), st.integers(0, 9)), max_size=20))
def test_no_kernel_is_dropped(drawn: list[tuple[str, int, int]]) -> None:
    host = [Event(CALL, 0, 100, 1), mark("attend", 20, 60), *(Event("op", 10 * i, 10 * i + 5, 1, id=i) for i in range(1, 8))]
    device = [kernel(name, 200 + 100 * i, ns, launcher=launcher) for i, (name, ns, launcher) in enumerate(drawn)]
    found = breakdown.summarise(host + device, NAMES, "cuda")
    assert found.total_s == pytest.approx(sum(ns for _, ns, _ in drawn) / 1e9)
    assert found.launches == len(drawn)
