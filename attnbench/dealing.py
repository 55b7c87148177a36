"""Checks one after another in this process, or dealt to several, each replaced after a fault or a hang."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from attnbench.isolate import Reply, Worker, WorkerDiedError, WorkerHungError
from attnbench.registry import add_plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from attnbench.checks import Asked, Finding

CHECK_S = 600.0
"""Time that a check in a process of its own may take, compilation included."""


def findings(
    checks: Sequence[Asked],
    device: str,
    concurrent: int = 1,
    *,
    plugins: Sequence[Path] = (),
    timeout_s: float = CHECK_S,
    hear: Callable[[int], None] = lambda _: None,
) -> Generator[tuple[int, Finding]]:
    """The place of each check in `checks` and what it found, as they end; `hear` is called with the place of each that starts.

    One process is this one, where checks run in order. Of several, those that compile are asked first; a check whose process dies, or
    takes longer than `timeout_s`, has failed, and says so.
    """
    if concurrent > 1:
        yield from _Several(checks, [Worker(setup, (device, tuple(plugins), concurrent)) for _ in checks[:concurrent]], timeout_s, hear)
        return
    for place, check in enumerate(checks):
        hear(place)
        yield place, check.run(device)


def order(checks: Sequence[Asked]) -> list[int]:
    """Places in the order in which checks are dealt: implementations that compile before the others, one check of each in turn.

    In turn, since checks of one implementation share kernels: run one after another, the later ones find them compiled on disk.
    """
    turns: Counter[str] = Counter()
    keys: list[tuple[bool, int, int]] = []
    for place, check in enumerate(checks):
        keys.append((not check.compiles, turns[check.subject], place))
        turns[check.subject] += 1
    return [place for *_, place in sorted(keys)]


def setup(device: str, plugins: tuple[Path, ...], processes: int) -> Callable[[Asked], Reply]:
    """Make a worker ready: plugins, the GPU, and on the CPU its share of the cores. A check that broke is the last of its process."""
    add_plugins(plugins)
    if device == "cuda":
        torch.cuda.init()
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))

    def job(check: Asked) -> Reply:
        found = check.run(device)
        return Reply(found, reusable=not found.broken)

    return job


@dataclass
class _Several:
    """Some checks at a time, each in one of the workers."""

    checks: Sequence[Asked]
    workers: Sequence[Worker]
    timeout_s: float
    hear: Callable[[int], None]
    _running: dict[int, tuple[Worker, threading.Thread]] = field(default_factory=dict)
    _told: SimpleQueue[tuple[int, Finding | Exception]] = field(default_factory=SimpleQueue)

    def __iter__(self) -> Iterator[tuple[int, Finding]]:
        """Run all of them. The processes end with the iteration, however it ends."""
        waiting, idle = deque(order(self.checks)), list(self.workers)
        try:
            while waiting or self._running:
                while waiting and idle:
                    self._start(waiting.popleft(), idle.pop())
                place, told = self._told.get()
                if isinstance(told, Exception):
                    raise told
                idle.append(self._running.pop(place)[0])
                yield place, told
        finally:
            self._stop()

    def _start(self, place: int, worker: Worker) -> None:
        thread = threading.Thread(target=self._run, args=(place, worker), daemon=True)
        self._running[place] = worker, thread
        self.hear(place)
        thread.start()

    def _run(self, place: int, worker: Worker) -> None:
        try:
            self._told.put((place, self._asked(self.checks[place], worker)))
        except Exception as error:  # told to the thread that waits
            self._told.put((place, error))

    def _asked(self, check: Asked, worker: Worker) -> Finding:
        modes = [check.mode(backward=False)]
        try:
            found: Finding = worker.run(check, self.timeout_s, lambda told: modes.append(told.text))
        except (WorkerHungError, WorkerDiedError, OSError) as error:  # the last where no process could be started
            return check.finding(modes[-1], "failed", str(error))
        return found

    def _stop(self) -> None:
        for worker, thread in self._running.values():
            while thread.is_alive():  # it may be about to start its process
                worker.stop()
                thread.join(0.1)
        for worker in self.workers:
            worker.stop()
