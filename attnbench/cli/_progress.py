"""Progress of a sweep on stderr."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from attnbench.case import Case
    from attnbench.isolate import Progress as CellProgress
    from attnbench.record import Record
    from attnbench.runner import Event


class Reporter:
    """Shows what a sweep tells: a bar with the running cell and the time left, a line for each cell that failed.

    A cell that trains has a bar of its own, in steps, with its loss and accuracy.
    Where stderr is no terminal, each finished cell is a line instead. `quiet` leaves failures and notes alone; with `echo`, each
    record also goes to stdout as one JSON line.
    """

    def __init__(self, *, quiet: bool = False, echo: bool = False) -> None:
        self.quiet, self.echo, self.done = quiet, echo, 0
        self._console = Console(stderr=True, soft_wrap=True)
        self._live = sys.stderr.isatty() and not quiet
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = (BarColumn(bar_width=16), MofNCompleteColumn(), *times, TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._progress.add_task("starting", total=None)
        self._cells: dict[Case, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, event: "Event") -> None:
        """Take an event of a sweep."""
        if event.kind == "note":
            self._line(f"note: {event.message}")
        self._progress.update(self._task, total=event.total, completed=event.index)
        if event.kind == "start":
            self._progress.update(self._task, description=escape(str(event.case)))
        if event.progress and event.case:
            self._follow(event.case, event.progress)
        if event.record:
            if event.record.case in self._cells:
                self._progress.remove_task(self._cells.pop(event.record.case))
            self.done += 1
            self._record(event.record, f"{event.index}/{event.total}")

    def _follow(self, case: "Case", progress: "CellProgress") -> None:
        if case not in self._cells:
            self._cells[case] = self._progress.add_task("", total=progress.total)
        text = escape(f"{case}: {progress.text}")
        self._progress.update(self._cells[case], completed=progress.done, total=progress.total, description=text)

    def _record(self, record: "Record", position: str) -> None:
        if self.echo:
            print(record.to_json(), flush=True)
        failed = str(record.status) not in ("ok", "unsupported", "skipped", "diverged")
        if failed or not (self.quiet or self._live):
            reason = f": {'; '.join(record.reasons)}" if record.reasons else ""
            self._line(f"[{position}] {record.status} {record.case}{reason}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
