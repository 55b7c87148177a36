"""Where cells run: in worker processes of this machine, or of others (`ray_executor`). A sweep hands cells over and takes records."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from attnbench import breakdown, cell, environment
from attnbench.isolate import Worker, WorkerDiedError, WorkerHungError
from attnbench.record import Record, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from attnbench import protocol
    from attnbench.case import Case
    from attnbench.isolate import Progress
    from attnbench.record import Breakdown

    Hear = Callable[[Case, Progress], None]

ENVIRONMENT_S = 600
"""Time that measuring the ceilings of a device may take."""


class Executor(Protocol):
    """What a sweep needs to know of the place where its cells run."""

    notes: list[str]
    """things to tell the user; whoever reads them empties the list"""

    @property
    def free(self) -> int:
        """Cells that could start at once."""

    def listen(self, hear: Hear) -> None:
        """Call `hear` with how far a running cell is, where the place hears of it."""

    def start(self) -> dict[str, Any]:
        """Make ready. Returns the environment that all cells run in, as `cell.facts` does. Raises `UserError`."""

    def submit(self, case: Case) -> None:
        """Start a cell; only where `free` is above 0."""

    def wait(self) -> list[Record]:
        """Records of cells that have ended since, possibly none. Raises `UserError` where no cell can ever end."""

    def stop(self) -> None:
        """End everything, at once."""


@dataclass
class Cells:
    """Runs one cell after another on one device, in worker processes that are replaced after a fault or a hang."""

    device: str
    protocol: protocol.Protocol
    plugins: tuple[Path, ...] = ()
    checkpoints: Path | None = None
    """folder of models that are being trained; None keeps none"""
    number: int = 0
    """tells cells beside each other apart, which take the GPUs of the machine in turn"""
    hear: Hear = lambda *_: None
    """called with how far a running cell is"""

    def __post_init__(self) -> None:
        arguments = (self.device, self.protocol, self.plugins)
        self._measuring = Worker(cell.setup, (*arguments, self.checkpoints, self.number))
        # another process, because a profiler that was once on may slow down what is timed later
        self._profiling = Worker(breakdown.setup, arguments)

    def facts(self) -> dict[str, Any]:
        """The environment, its id and its ceilings."""
        found: dict[str, Any] = self._measuring.run(cell.ENVIRONMENT, ENVIRONMENT_S)
        return found

    def run(self, case: Case) -> Record:
        """Run one cell; whatever happens to its process becomes its status. The record is `rounded`."""
        started = now()
        return replace(self._run(case), started=started, commit=environment.commit()).rounded()

    def _run(self, case: Case) -> Record:
        limit = self.protocol.timeout_s
        heard: list[Progress] = []

        def hear(progress: Progress) -> None:
            heard[:] = [progress]
            self.hear(case, progress)

        try:
            record: Record = self._measuring.run(case, limit, hear)
        except WorkerHungError as error:
            return _stopped(case, str(error), limit, heard)
        except WorkerDiedError as error:
            return Record(case, Status.ERROR, "", reasons=(str(error),))
        return self._taken_apart(record) if self.protocol.breakdown and record.status is Status.OK else record

    def _taken_apart(self, record: Record) -> Record:
        """The record with a breakdown, or with the reason why there is none; its measurements stand either way."""
        try:
            parts: Breakdown | str = self._profiling.run(record, self.protocol.timeout_s)
        except (WorkerHungError, WorkerDiedError) as error:
            parts = str(error)
        if isinstance(parts, str):
            return replace(record, reasons=(*record.reasons, f"no breakdown: {parts}"))
        return replace(record, breakdown=parts)

    def stop(self) -> None:
        """End the processes."""
        self._measuring.stop()
        self._profiling.stop()


def _stopped(case: Case, why: str, limit: float, heard: Sequence[Progress]) -> Record:
    """The record of a cell that outran its time; of one that trained and left more than it found, `kept_steps` says how much."""
    gained = heard[-1] if heard and heard[-1].gained else None
    reasons = (why, f"{gained.kept} of {gained.total} steps are kept: --resume goes on there") if gained else (why,)
    return Record(case, Status.TIMEOUT, "", reasons=reasons, limit_s=limit, kept_steps=gained.kept if gained else None)


@dataclass
class Local:
    """One cell at a time on this machine."""

    cells: Cells
    notes: list[str] = field(default_factory=list)
    _case: Case | None = None

    @property
    def free(self) -> int:
        """1 between two cells."""
        return int(self._case is None)

    def listen(self, hear: Hear) -> None:
        """Call `hear` with how far the running cell is."""
        self.cells.hear = hear

    def start(self) -> dict[str, Any]:
        """Measure the environment."""
        return self.cells.facts()

    def submit(self, case: Case) -> None:
        """Remember the cell; `wait` runs it."""
        self._case = case

    def wait(self) -> list[Record]:
        """Run the cell."""
        case, self._case = self._case, None
        return [] if case is None else [self.cells.run(case)]

    def stop(self) -> None:
        """End the processes."""
        self.cells.stop()


@dataclass
class Several:
    """Some cells at a time on the devices of this machine, each in a process of its own: for cells that are not timed.

    A cell that runs out of memory beside others runs once more when none is beside it, before any other starts.
    """

    cells: Sequence[Cells]
    notes: list[str] = field(default_factory=list)
    _idle: list[Cells] = field(default_factory=list)
    _running: dict[Case, Cells] = field(default_factory=dict)
    _alone: list[Case] = field(default_factory=list)
    """cells that need the whole device; while there are any, no other starts"""
    _told: SimpleQueue[tuple[Case, Progress | Record | Exception]] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self._idle = list(self.cells)
        self.listen(lambda *_: None)
        for cells in self.cells:
            cells.hear = lambda case, progress: self._told.put((case, progress))

    @property
    def free(self) -> int:
        """Idle processes, none while a cell has or waits for the whole device."""
        return 0 if self._alone else len(self._idle)

    def listen(self, hear: Hear) -> None:
        """Call `hear` with how far a running cell is, in the thread that waits."""
        self._hear = hear

    def start(self) -> dict[str, Any]:
        """Measure the environment, with one process."""
        return self.cells[0].facts()

    def submit(self, case: Case) -> None:
        """Start the cell."""
        cells = self._running[case] = self._idle.pop()
        threading.Thread(target=self._run, args=(cells, case), daemon=True).start()

    def _run(self, cells: Cells, case: Case) -> None:
        try:
            self._told.put((case, cells.run(case)))
        except Exception as error:  # told to the thread that waits
            self._told.put((case, error))

    def wait(self) -> list[Record]:
        """The record of the next cell that ends, or nothing where one only told how far it is."""
        if self._alone and not self._running:
            self.submit(self._alone[0])
        case, told = self._told.get()
        if isinstance(told, Exception):
            raise told
        if not isinstance(told, Record):
            self._hear(case, told)
            return []
        self._idle.append(self._running.pop(case))
        if told.status is Status.OOM and case not in self._alone:
            self.notes.append(f"{case} ran out of memory beside other cells: it runs again alone")
            self._alone.append(case)
            return []
        self._alone = [c for c in self._alone if c != case]
        return [told]

    def stop(self) -> None:
        """End the processes."""
        for cells in self.cells:
            cells.stop()


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
