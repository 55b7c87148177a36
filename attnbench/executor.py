"""Where cells run: in worker processes of this machine, or of others (`ray_executor`). A sweep hands cells over and takes records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from attnbench import breakdown, cell, environment
from attnbench.isolate import Worker, WorkerDiedError, WorkerHungError
from attnbench.record import Record, Status

if TYPE_CHECKING:
    from pathlib import Path

    from attnbench import suite
    from attnbench.record import Breakdown
    from attnbench.suite import Case

ENVIRONMENT_S = 600
"""Time that measuring the ceilings of a device may take."""


class Executor(Protocol):
    """What a sweep needs to know of the place where its cells run."""

    notes: list[str]
    """things to tell the user; whoever reads them empties the list"""

    @property
    def free(self) -> int:
        """Cells that could start at once."""

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
    protocol: suite.Protocol
    plugins: tuple[Path, ...] = ()
    checkpoints: Path | None = None
    """folder of models that are being trained; None keeps none"""

    def __post_init__(self) -> None:
        arguments = (self.device, self.protocol, self.plugins)
        self._measuring = Worker(cell.setup, (*arguments, self.checkpoints))
        # another process, because a profiler that was once on may slow down what is timed later
        self._profiling = Worker(breakdown.setup, arguments)

    def facts(self) -> dict[str, Any]:
        """The environment, its id and its ceilings."""
        found: dict[str, Any] = self._measuring.run(cell.ENVIRONMENT, ENVIRONMENT_S)
        return found

    def run(self, case: Case) -> Record:
        """Run one cell; whatever happens to its process becomes its status."""
        started = now()
        return replace(self._run(case), started=started, commit=environment.commit())

    def _run(self, case: Case) -> Record:
        limit = self.protocol.timeout_s
        try:
            record: Record = self._measuring.run(case, limit)
        except WorkerHungError as error:
            return Record(case, Status.TIMEOUT, "", reasons=(str(error),), limit_s=limit)
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


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
