"""Cells on all GPUs of a Ray cluster, one at a time on each, so that nothing that is timed shares its device.

Each GPU (on a CPU-only cluster, each node) has an actor that runs cells as `executor.Cells` does on this machine, in worker processes of
its own. Cells that a lost worker held run again elsewhere, nodes that join later take part, and records come back to the one store of the
process that started the sweep. A sweep has one environment: workers that differ from most in it are told and left idle, because their
numbers may not stand beside the others'. Nodes need the same attnbench, and plugins at the same paths.

Ray: https://docs.ray.io
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnbench.errors import UserError
from attnbench.executor import ENVIRONMENT_S, Cells, now
from attnbench.record import Record, Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attnbench.case import Case
    from attnbench.executor import Hear
    from attnbench.protocol import Protocol

LOSSES = 3
"""So many workers may be lost to a cell before it counts as failed."""
SCAN_S = 5.0
"""Time between two looks for nodes that have joined."""
PATIENCE_S = 60.0
"""How long a sweep without any worker waits for one to join."""


@dataclass(eq=False)
class _Slot:
    """One GPU or node, and what its actor is at."""

    node: str
    name: str
    actor: Any
    future: Any = None
    case: Case | None = None
    """None with a future: still telling its environment"""


@dataclass
class RayExecutor:
    """The workers of the cluster that this process is connected to; see `connect`."""

    ray: Any
    device: str
    protocol: Protocol
    plugins: tuple[Path, ...] = ()
    checkpoints: Path | None = None
    """folder of models that are being trained, as every node sees it"""
    notes: list[str] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _queue: list[Case] = field(default_factory=list)
    """cells that no worker has yet, those of lost workers first"""
    _losses: Counter[Case] = field(default_factory=Counter)
    _refused: Counter[str] = field(default_factory=Counter)
    """node -> GPUs that are of no use"""
    _env_id: str = ""
    _scanned: float = 0.0

    @property
    def free(self) -> int:
        """Idle workers that no waiting cell will take."""
        return sum(slot.future is None for slot in self._slots) - len(self._queue)

    def listen(self, hear: Hear) -> None:
        """Does nothing: how far a cell is stays on its node."""

    def start(self) -> dict[str, Any]:
        """Start a worker on every GPU and settle on the environment that most of them share. Raises `UserError` where none starts."""
        self._scan()
        futures = {slot.future: slot for slot in self._slots}
        ready, _ = self.ray.wait(list(futures), num_returns=len(futures), timeout=ENVIRONMENT_S) if futures else ([], [])
        told = {futures[f]: facts for f in ready if (facts := self._facts(futures[f]))}
        if not told:
            why = "; ".join(dict.fromkeys(self.notes)) or f"no worker was given a {self._unit} within {ENVIRONMENT_S} s"
            raise UserError(f"no worker of the Ray cluster can run cells: {why}")
        self._env_id = Counter(facts["env_id"] for facts in told.values()).most_common(1)[0][0]
        for slot, facts in told.items():
            self._admit(slot, facts)
        return dict(next(facts for facts in told.values() if facts["env_id"] == self._env_id))

    def submit(self, case: Case) -> None:
        """Hand a cell to an idle worker."""
        self._queue.append(case)
        self._dispatch()

    def wait(self) -> list[Record]:
        """Records of cells that have ended; after a while without any, none. Raises `UserError` where no worker is left."""
        futures = {slot.future: slot for slot in self._slots if slot.future is not None}
        ready, _ = self.ray.wait(list(futures), timeout=SCAN_S) if futures else ([], [])
        found = [record for future in ready if (record := self._take(futures[future]))]
        self._look_around()
        self._dispatch()
        return found

    def stop(self) -> None:
        """Leave the cluster; its workers of this sweep end."""
        self.ray.shutdown()

    @property
    def _unit(self) -> str:
        return "GPU" if self.device == "cuda" else "node"

    def _scan(self) -> None:
        """Start a worker wherever there is room for one, and forget idle ones whose node is gone."""
        self._scanned = time.monotonic()
        nodes = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        self._slots = [slot for slot in self._slots if slot.future is not None or slot.node in nodes]
        for key, node in nodes.items():
            cores = int(node["Resources"].get("CPU", 0))
            room = int(node["Resources"].get("GPU", 0)) if self.device == "cuda" else int(cores > 0)
            taken = sum(slot.node == key for slot in self._slots) + self._refused[key]
            for i in range(taken, room):
                self._slots.append(self._started(key, f"{self._unit} {i} of {node['NodeManagerAddress']}", cores))

    def _started(self, node: str, name: str, cores: int) -> _Slot:
        pinned = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        needs = {"num_gpus": 1, "num_cpus": 0} if self.device == "cuda" else {"num_cpus": cores}
        kind = self.ray.remote(**needs, scheduling_strategy=pinned, max_restarts=0)(_Place)
        actor = kind.remote(self.device, self.protocol, self.plugins, self.checkpoints, os.environ.get("OMP_NUM_THREADS"))
        return _Slot(node, name, actor, actor.facts.remote())

    def _facts(self, slot: _Slot) -> dict[str, Any] | None:
        """The environment of a worker that has started; one that could not is refused, with a note that says why."""
        try:
            facts: dict[str, Any] = self.ray.get(slot.future)
        except self.ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._refuse(slot, f"did not start: {lines[-1][:300] if lines else type(error).__name__}")
            return None
        return facts

    def _admit(self, slot: _Slot, facts: dict[str, Any]) -> None:
        if facts["env_id"] == self._env_id:
            slot.future = None
        else:
            self._refuse(slot, f"is left idle: {facts['device']}, torch {facts['torch']} is another environment than most workers have")

    def _refuse(self, slot: _Slot, why: str) -> None:
        self.notes.append(f"{slot.name} {why}")
        self._refused[slot.node] += 1
        self._drop(slot)

    def _drop(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        self.ray.kill(slot.actor)

    def _take(self, slot: _Slot) -> Record | None:
        """What a worker has answered: a record, or None where it told its environment or was lost."""
        if slot.case is None:
            facts = self._facts(slot)
            if facts:
                self._admit(slot, facts)
            return None
        case = slot.case
        try:
            record: Record = self.ray.get(slot.future)
        except self.ray.exceptions.RayActorError:
            return self._lost(slot, case)
        slot.future = slot.case = None
        return record

    def _lost(self, slot: _Slot, case: Case) -> Record | None:
        self._drop(slot)
        self._losses[case] += 1
        if self._losses[case] >= LOSSES:
            return Record(case, Status.ERROR, "", reasons=(f"lost its worker {LOSSES} times, last on {slot.name}",), started=now())
        self.notes.append(f"lost {slot.name}, which ran {case}: it runs again elsewhere")
        self._queue.insert(0, case)
        return None

    def _look_around(self) -> None:
        """Scan now and then; where no worker is left, until one joins or patience ends."""
        if time.monotonic() - self._scanned > SCAN_S:
            self._scan()
        deadline = time.monotonic() + PATIENCE_S
        while not self._slots:
            if time.monotonic() > deadline:
                raise UserError("no worker is left in the Ray cluster: add nodes and run again with --resume, nothing is lost")
            time.sleep(1)
            self._scan()

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._queue and slot.future is None:
                slot.case = self._queue.pop(0)
                slot.future = slot.actor.run.remote(slot.case)


class _Place(Cells):
    """What an actor holds. Threads are as the sweep's own process has them: Ray would set one a core that was asked for."""

    def __init__(self, device: str, protocol: Protocol, plugins: tuple[Path, ...], checkpoints: Path | None, threads: str | None) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        super().__init__(device, protocol, plugins, checkpoints)


def connect(
    address: str | None, device: str | None, protocol: Protocol, plugins: Sequence[Path] = (), checkpoints: Path | None = None
) -> RayExecutor:
    """Join the Ray cluster at `address` (`HOST:PORT`; None: at `RAY_ADDRESS`, or this machine's, started where there is none).

    `device` is `cpu`, `cuda`, or None for what the cluster has. Raises `UserError` where ray is not installed, no cluster answers, or it
    has no such device.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # workers without a GPU see what processes here see
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError("--executor ray needs ray, which is not installed: pip install 'attnbench[ray]'") from None
    address = address or os.environ.get("RAY_ADDRESS")
    _knock(address)
    try:
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise _unreachable(address, first[0] if first else type(error).__name__) from None
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not gpus:
        ray.shutdown()
        raise UserError("device cuda was asked for, but no node of the Ray cluster has a GPU: use --device cpu, or add such a node")
    kept = checkpoints.resolve() if checkpoints else None
    return RayExecutor(ray, device or ("cuda" if gpus else "cpu"), protocol, tuple(path.resolve() for path in plugins), kept)


def _knock(address: str | None) -> None:
    """See whether anything listens there, since Ray itself would try for a minute. Raises `UserError`."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, str(error)) from None


def _unreachable(address: str | None, why: str) -> UserError:
    return UserError(f"no Ray cluster answers at {address or 'this machine'} ({why}): start one with `ray start --head`, or mend --address")
