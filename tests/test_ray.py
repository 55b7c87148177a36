"""Cells on a Ray cluster: a real one of two CPU nodes, one of which is killed on the way."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from cli_support import call

from attnbench import ray_executor, runner, store
from attnbench.errors import UserError
from attnbench.protocol import Protocol
from attnbench.record import Record, Status
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK = Protocol(half_width=0.5, budget_s=0.02, max_samples=4, timeout_s=60.0, aa=False)
LENGTHS = (16, 24, 32, 40, 48, 56)


def trial(*lengths: int) -> Suite:
    axes = {"n": lengths, "heads": (1,), "dim": (8,), "dtype": ("float32",)}
    return Suite("trial", "", "", "speed", tuple(Entry(f"softmax@{name}") for name in ("eager", "math")), axes, QUICK)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores and two nodes with one core each."""
    ray = pytest.importorskip("ray", reason="ray is an optional extra: pip install 'attnbench[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store_bytes = 80 * 2**20
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": store_bytes})
    nodes = [made.add_node(num_cpus=1, object_store_memory=store_bytes) for _ in range(2)]
    yield made, nodes
    ray.shutdown()
    made.shutdown()


@pytest.mark.timeout(180)
def test_a_run_starts_here_and_ends_on_a_cluster_that_loses_a_node(cluster: Any, tmp_path: Path) -> None:
    from attnbench.ray_executor import connect

    made, nodes = cluster
    here = runner.sweep(trial(*LENGTHS[:2]), tmp_path, device="cpu")
    events: list[runner.Event] = []

    def tell(event: runner.Event) -> None:
        events.append(event)
        if sum(e.kind == "record" for e in events) == 2 and event.kind == "start":
            made.remove_node(nodes[0], allow_graceful=False)

    whole = trial(*LENGTHS)
    place = connect(made.address, None, whole.protocol)
    assert place.device == "cpu", "the cluster has no GPU"
    there = runner.sweep(whole, tmp_path, device=place.device, resume=True, place=place, tell=tell)
    assert (here.counts[Status.OK], there.resumed, there.counts[Status.OK]) == (4, 4, 8), "one environment, the same cells"
    assert there.folder == here.folder, "one store"
    records = store.read(there.folder / store.RECORDS).records
    assert Counter(r.case.case_id for r in records) == Counter(c.case_id for c in whole.expand()), "nothing lost, nothing twice"
    assert {r.env_id for r in records} == {records[0].env_id}
    assert all(r.started and r.timing for r in records)
    assert any(e.kind == "note" and "it runs again elsewhere" in e.message for e in events), [e.message for e in events]
    for series in {r.case.series for r in records}:
        lengths = [r.case.n for r in records if r.case.series == series]
        assert lengths == sorted(lengths), "the lengths of a series run one after another"


@dataclass(eq=False)
class _Future:
    answer: Any


class Unlucky:
    """Stands in for Ray: nodes of one core each whose actors tell the environment given and die, or answer, whenever they run a cell."""

    class exceptions:  # noqa: N801 (as ray has it)
        class RayError(Exception): ...

        class RayActorError(RayError): ...

    def __init__(self, environments: list[str], *, dies: bool) -> None:
        self.environments, self.dies, self.killed = environments, dies, 0
        self.util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id))

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": str(i), "Alive": True, "Resources": {"CPU": 1}, "NodeManagerAddress": f"node{i}"}
            for i in range(len(self.environments))
        ]

    def remote(self, *, scheduling_strategy: str, **_: object) -> Any:
        facts = {"env_id": self.environments[int(scheduling_strategy)], "device": "A CPU", "torch": "2"}
        told = SimpleNamespace(remote=lambda: _Future(facts))
        ran = SimpleNamespace(remote=lambda case: _Future(Record(case, Status.OK, "")))
        return lambda _: SimpleNamespace(remote=lambda *_: SimpleNamespace(facts=told, run=ran))

    def wait(self, futures: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return futures, []

    def get(self, future: Any) -> Any:
        if self.dies and isinstance(future.answer, Record):
            raise self.exceptions.RayActorError
        return future.answer

    def kill(self, _: object) -> None:
        self.killed += 1


def test_a_cell_that_no_worker_survives_becomes_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "SCAN_S", -1.0)
    place = ray_executor.RayExecutor(Unlucky(["a", "a"], dies=True), "cpu", QUICK)
    place.start()
    (case, *_) = trial(16).expand()
    place.submit(case)
    assert place.free == 1
    assert [place.wait() for _ in range(ray_executor.LOSSES - 1)] == [[], []]
    (record,) = place.wait()
    assert (record.case, record.status) == (case, Status.ERROR)
    assert "lost its worker 3 times" in record.reasons[0]
    assert sum("runs again elsewhere" in note for note in place.notes) == 2


def test_workers_of_another_environment_stay_idle_and_are_told() -> None:
    ray = Unlucky(["a", "b", "a"], dies=False)
    place = ray_executor.RayExecutor(ray, "cpu", QUICK)
    assert place.start()["env_id"] == "a"
    assert (place.free, ray.killed) == (2, 1)
    assert place.notes == ["node 0 of node1 is left idle: A CPU, torch 2 is another environment than most workers have"]
    with pytest.raises(UserError, match="no worker of the Ray cluster can run cells"):
        ray_executor.RayExecutor(Unlucky([], dies=False), "cpu", QUICK).start()


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--executor", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1 ("),
        (["--executor", "ray", "--address", "127.0.0.1:99999"], "no Ray cluster answers at 127.0.0.1:99999 ("),
        (["--address", "127.0.0.1:6379"], "--address is of a Ray cluster: add --executor ray"),
    ],
)
def test_an_address_without_a_cluster_is_one_clear_line(words: list[str], culprit: str, suite: Path, tmp_path: Path) -> None:
    if "ray" in words:
        pytest.importorskip("ray", reason="ray is an optional extra: pip install 'attnbench[ray]'")
    result = call("run", suite, "--results", tmp_path / "r", *words)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert culprit in result.stderr
    assert not (tmp_path / "r").exists()


def test_without_ray_one_clear_line_says_how_to_get_it(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = call("run", suite, "--executor", "ray")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install 'attnbench[ray]'" in result.stderr
