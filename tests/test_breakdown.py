"""Cost anatomy: marks, traces, what is attributed to whom, and that nothing is lost."""

from __future__ import annotations

import ast
import contextlib
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnbench
from attnbench import breakdown, inputs, runner, stages, store, trace
from attnbench.cost import Cost, Work
from attnbench.method import Shape
from attnbench.record import Breakdown, Record, Status
from attnbench.stages import GRADIENT, PREFIX, STAGES, home, marking, rank, stage
from attnbench.suite import Case, Entry, Protocol, Suite
from attnbench.trace import BACKWARD, CALL, FORWARD, Event

ROOT = Path(attnbench.__file__).parent
METHODS = Path(importlib.import_module("attnbench.methods").__file__ or "").parent


# Marks


def test_a_mark_does_nothing_until_a_breakdown_is_taken() -> None:
    assert isinstance(stage("attend"), contextlib.nullcontext)
    with marking():
        assert isinstance(stage("attend"), torch.profiler.record_function)
        assert isinstance(stage("attend gradient"), torch.profiler.record_function)
        with pytest.raises(ValueError, match="'atend' is no stage: choose from project, pool"):
            stage("atend")
    assert isinstance(stage("atend"), contextlib.nullcontext)
    with pytest.raises(RuntimeError), marking():
        raise RuntimeError
    assert isinstance(stage("attend"), contextlib.nullcontext), "marks end even where a call raises"


def test_marks_break_no_compiled_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with stage("pool"):
            x = x.cumsum(0)
            with stage("attend"):
                return x.exp()

    x = torch.randn(5)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def marks_in(path: Path) -> set[str]:
    """Names that a file marks."""
    calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
    return {c.args[0].value for c in calls if getattr(c.func, "id", "") == "stage" and isinstance(c.args[0], ast.Constant)}


def test_every_mark_and_every_counted_stage_is_of_the_vocabulary() -> None:
    files = [*METHODS.rglob("*.py"), *(p for p in ROOT.rglob("*.py") if p.name != "stages.py")]
    marked = set().union(*map(marks_in, files))
    assert marked >= {"pool", "route", "permute", "attend", "merge", "compress", "invert"}
    assert {m for m in marked if not stages.known(m)} == set()
    for name in attnbench.methods():
        method, shape = attnbench.get(name), Shape(1, 2, 256, 64)
        cost = method.cost(shape, method.params().fitted(shape))
        for counted in cost.by_stage(2):
            assert stages.known(counted) or home(counted, STAGES) != "other", f"{name} counts {counted!r}, which is no stage"
        for implementation in method.implementations:
            assert all(map(stages.known, implementation.stages)), f"{name}@{implementation.name}"


def test_stages_come_in_the_order_of_a_call() -> None:
    names = ["other", "attend gradient", "backward", "attend", "pool gradient", "pool", "merge"]
    assert sorted(names, key=rank) == ["pool", "attend", "merge", "pool gradient", "attend gradient", "backward", "other"]


@pytest.mark.parametrize(
    ("counted", "measured", "want"),
    [
        ("score", ["score", "attend"], "score"),
        ("score", ["attend"], "attend"),
        ("score", ["pool"], "other"),
        ("probe", ["compress", "attend"], "compress"),
        ("compress", ["probe", "attend"], "probe"),
        ("read", ["state", "attend"], "attend"),
        ("compress gradient", ["probe gradient", "backward"], "probe gradient"),
        ("route gradient", ["attend gradient", "pool gradient"], "attend gradient"),
        ("attend gradient", ["attend", "backward"], "backward"),
        ("attend gradient", ["attend"], "other"),
    ],
)
def test_counted_work_goes_to_the_stage_that_does_it(counted: str, measured: list[str], want: str) -> None:
    assert home(counted, measured) == want


# Traces


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


# Real calls


def take(label: str, *, backward: bool = False, n: int = 96, calls: int = 2, **params: object):
    method, shape = attnbench.get(label), Shape(1, 4, n, 16, kv_heads=2)
    chosen = method.implementation(method.pinned)
    values = method.parse({**method.params().fitted(shape).as_dict(), **params})
    leaves = [x.requires_grad_(backward) for x in inputs.draw("randn", shape, 0, torch.float32, "cpu")]

    def gradients(out: torch.Tensor) -> object:
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return breakdown.measure(
        lambda: method.run(chosen, *leaves, values), gradients if backward else None, device="cpu", calls=calls, kernels=chosen.stages
    )


MARKED = {
    "moba@varlen": {"pool", "route", "permute", "attend", "merge"},
    "mita@varlen": {"pool", "probe", "compress", "select", "route", "permute", "gather", "attend", "merge"},
    "topk@chunked": {"score", "select", "gather", "attend"},
    "nystromformer@sdpa": {"pool", "compress", "invert", "attend"},
    "agent@sdpa": {"pool", "compress", "attend"},
    "sliding_window@chunked": {"attend"},
    "linear@chunked": {"state", "attend"},
    "softmax@math": {"attend"},
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("label", MARKED)
def test_implementations_mark_their_stages(label: str, backward: bool) -> None:
    found = take(label, backward=backward)
    assert set(found.stages_s) - {"other"} == MARKED[label] | ({"backward"} if backward else set())
    assert all(t > 0 for t in found.stages_s.values())
    assert found.total_s == pytest.approx(sum(found.stages_s.values()))
    assert found.stages_s.get("other", 0.0) < found.total_s / 2, "most of the work is marked"
    assert found.launches >= found.kernels > 0
    assert found.synchronisations is None


def test_the_stage_that_works_most_takes_most_time() -> None:
    x = torch.randn(400, 400)

    def forward() -> torch.Tensor:
        with stage("pool"):
            y = x.sum(0, keepdim=True)
        with stage("attend"):
            for _ in range(40):
                x @ x
        return y

    found = breakdown.measure(forward, None, device="cpu", calls=3, kernels={})
    assert found.stages_s["attend"] > 5 * found.stages_s["pool"]
    named = breakdown.measure(forward, None, device="cpu", calls=1, kernels={"merge": ("aten::mm", "aten::addmm")})
    assert named.stages_s["merge"] > named.stages_s["attend"], "a name counts more than a mark"


def test_each_call_is_prepared_outside_what_is_counted() -> None:
    prepared = []

    def prepare() -> None:
        prepared.append(torch.ones(10).cos())

    found = breakdown.measure(lambda: torch.ones(3).exp(), None, device="cpu", calls=2, kernels={"select": ("cos",)}, prepare=prepare)
    assert len(prepared) == 3, "the calls counted and one before them"
    assert set(found.stages_s) == {"other"}


# What a cost model counts


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", attnbench.methods())
def test_no_counted_work_is_lost_whatever_was_measured(name: str, mode: str) -> None:
    method, shape = attnbench.get(name), Shape(2, 4, 256, 64, kv_heads=4)
    cost = method.cost(shape, method.params().fitted(shape))
    for measured in (["other"], ["attend", "backward"], list(STAGES), [*STAGES, *(s + GRADIENT for s in STAGES)]):
        found = breakdown.needs(cost, 2, mode, measured)
        rounding = 0 if mode == "forward" else len(cost.flops)  # halves are rounded down stage by stage
        assert 0 <= cost.total(mode) - sum(w.flops for w in found.values()) <= rounding
        if cost.traffic and mode == "forward":
            assert sum(w.bytes for w in found.values()) >= 2 * Cost.once(shape), "each stage reads and writes what it needs"


def test_gradients_that_share_a_kernel_share_its_reads() -> None:
    cost = Cost({"route": 10, "attend": 20}, 1000, traffic={"route": 100, "attend": 200}, recomputes=False)
    apart = breakdown.needs(cost, 2, "forward+backward", ["route", "attend", "route gradient", "attend gradient"])
    assert apart == {"route": Work(10, 200), "attend": Work(20, 400), "route gradient": Work(20, 400), "attend gradient": Work(40, 800)}
    joined = breakdown.needs(cost, 2, "forward+backward", ["route", "attend", "attend gradient"])
    assert joined == {"route": Work(10, 200), "attend": Work(20, 400), "attend gradient": Work(60, 800)}
    whole = breakdown.needs(cost, 2, "forward+backward", ["route", "attend", "backward"])
    assert whole == {"route": Work(10, 200), "attend": Work(20, 400), "backward": Work(60, 4000)}


def launched() -> set[str]:
    """Kernels of the fused operator, by name."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "kernels" / "mita").glob("*.py")]
    functions = (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel"))
    return {f.name for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)}


def test_every_fused_kernel_has_a_stage() -> None:
    names = launched()
    assert len(names) >= 15
    for label in ("mita@triton", "agent@triton"):
        declared = attnbench.get(label).implementation("triton").stages
        for name in names:
            (piece,) = trace.pieces([Event(CALL, 0, 9), kernel(name, 1, 1)], declared, "cuda")
            assert name in declared.get(piece.stage, ()), f"{name} belongs to no stage: add it to methods/_fused.py"
            assert "grad" not in name or piece.stage.endswith(GRADIENT)


# Records


def sweep(results: Path, *, wanted: bool, resume: bool = False, label: str = "agent@sdpa") -> runner.Summary:
    protocol = Protocol(budget_s=0.02, max_samples=4, aa=False, breakdown=wanted)
    axes = {"n": (64,), "heads": (2,), "dim": (8,), "mode": ("forward", "forward+backward")}
    return runner.sweep(Suite("trial", "", "", "speed", (Entry(label),), axes, protocol), results, device="cpu", resume=resume)


def test_a_sweep_takes_cells_apart_only_where_asked_and_again_where_they_lack_it(tmp_path: Path) -> None:
    first = sweep(tmp_path, wanted=False)
    assert [r.breakdown for r in first.records] == [None, None]
    again = sweep(tmp_path, wanted=True, resume=True)
    assert (again.counts[Status.OK], again.resumed) == (2, 0)
    assert sweep(tmp_path, wanted=True, resume=True).resumed == 2
    assert {r.case.case_id for r in again.records} == {r.case.case_id for r in first.records}, "how it was measured is not what was"
    for record in again.records:
        assert record.reasons == ()
        assert set(record.breakdown.flops) >= {"pool", "compress", "attend"}
        assert sum(record.breakdown.flops.values()) == pytest.approx(record.flops, abs=9)
    stored = store.read(again.folder / store.RECORDS).records
    assert [r.breakdown for r in stored] == [r.breakdown for r in (*first.records, *again.records)]


def _deadly(*_: object):
    def job(record: Record) -> None:
        raise SystemExit(5)

    return job


def test_a_measurement_outlives_the_process_that_takes_it_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "setup", _deadly)
    summary = sweep(tmp_path, wanted=True)
    assert summary.counts == {Status.OK: 2}
    for record in summary.records:
        assert record.timing is not None
        assert record.breakdown is None
        assert record.reasons == ("no breakdown: worker exited with 5",)


def test_what_an_implementation_raises_is_the_reason(tmp_path: Path) -> None:
    (first, _) = sweep(tmp_path, wanted=False).records
    anatomist = breakdown.Anatomist("cpu", Protocol())
    assert isinstance(anatomist(first).value, Breakdown)
    reply = anatomist(replace(first, implementation="spda"))
    assert reply.value == "UserError: unknown implementation 'spda' in agent: did you mean sdpa?"
    assert not reply.reusable, "after a fault the process is replaced"


def test_records_without_a_breakdown_still_load() -> None:
    line = '{"schema":1,"case":{"task":"speed","method":"softmax","params":{}},"status":"ok","env_id":"e","reasons":[]}'
    record = Record.from_json(line)
    assert record.breakdown is None
    assert '"breakdown":null' in record.to_json()


def test_a_failure_holds_no_breakdown() -> None:
    parts = breakdown.summarise(gpu_call(10_000), NAMES, "cuda")
    record = Record(Case(task="speed", method="softmax"), Status.OOM, "e")
    with pytest.raises(ValueError, match="may not hold measurements"):
        replace(record, breakdown=parts)
