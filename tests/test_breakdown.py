"""Cost anatomy of real calls, the work that a cost model counts beside it, and what of it a sweep keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import attnbench
from attnbench import breakdown, inputs, runner, store
from attnbench.case import Case
from attnbench.cost import Cost, Work
from attnbench.method import Shape
from attnbench.protocol import Protocol
from attnbench.record import Breakdown, Record, Status
from attnbench.stages import GRADIENT, STAGES, stage
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from pathlib import Path


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
    "nsa@varlen": {"project", "pool", "route", "permute", "attend", "merge"},
    "bra@varlen": {"pool", "route", "permute", "gather", "attend"},
    "block_window@sdpa": {"permute", "attend"},
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
    anatomist = breakdown.setup("cpu", Protocol(), ())
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
    parts = Breakdown({"attend": 1.0}, 1.0, 1, 1, None, 1, "made up")
    record = Record(Case(task="speed", method="softmax"), Status.OOM, "e")
    with pytest.raises(ValueError, match="may not hold measurements"):
        replace(record, breakdown=parts)
