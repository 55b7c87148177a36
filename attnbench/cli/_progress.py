"""Progress on stderr, of a sweep and of checks."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnbench.cli._output import StdoutError, silence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from attnbench.case import Case
    from attnbench.isolate import Progress as CellProgress
    from attnbench.record import Record
    from attnbench.runner import Event


T = TypeVar("T")


def _bars(console: Console, *, live: bool, transient: bool = False) -> Progress:
    """Bars with the count, the time taken and left, and a text; `transient` ones leave nothing behind."""
    columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # what is printed meanwhile goes above the bars on a terminal, and where it was sent otherwise
    return Progress(*columns, console=console, disable=not live, transient=transient, redirect_stdout=sys.stdout.isatty())


class Reporter:
    """Shows what a sweep tells: a bar with the running cell and the time left, a line for each cell that failed.

    A cell that trains has a bar of its own, in steps, with its loss and accuracy.
    Where stderr is no terminal, each finished cell is a line instead. `quiet` leaves failures and notes alone; with `echo`, each
    record also goes to stdout as one JSON line; `lost` says that one could not.
    """

    def __init__(self, *, quiet: bool = False, echo: bool = False) -> None:
        self.quiet, self.echo, self.done, self.lost = quiet, echo, 0, False
        self._console = Console(stderr=True, soft_wrap=True)
        self._live = sys.stderr.isatty() and not quiet
        self._progress = _bars(self._console, live=self._live)
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
            self._progress.update(self._task, description=escape(event.name))
        if event.progress and event.case:
            self._follow(event.case, event.name, event.progress)
        if event.record:
            if event.record.case in self._cells:
                self._progress.remove_task(self._cells.pop(event.record.case))
            self.done += 1
            self._record(event.record, event.name, f"{event.index}/{event.total}")

    def _follow(self, case: "Case", name: str, progress: "CellProgress") -> None:
        if case not in self._cells:
            self._cells[case] = self._progress.add_task("", total=progress.total)
        text = escape(f"{name}: {progress.text}")
        self._progress.update(self._cells[case], completed=progress.done, total=progress.total, description=text)

    def _record(self, record: "Record", name: str, position: str) -> None:
        if self.echo:
            self._echo(record)
        failed = str(record.status) not in ("ok", "unsupported", "skipped", "diverged")
        if failed or not (self.quiet or self._live):
            reason = f": {'; '.join(record.reasons)}" if record.reasons else ""
            self._line(f"[{position}] {record.status} {name}{reason}")

    def _echo(self, record: "Record") -> None:
        """To stdout; where it cannot be written that is told once, and the sweep goes on: records are on disk."""
        try:
            print(record.to_json(), flush=True)
        except StdoutError as error:
            silence()
            self.echo, self.lost = False, True
            self._line(f"{error}; records are stored all the same")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class Tally:
    """A bar of how many of some like things are done, with the one that has run longest; shown while they run, on a terminal alone."""

    def __init__(self, names: "Sequence[str]") -> None:
        self._names = names
        self._running: dict[int, None] = {}
        self._progress = _bars(Console(stderr=True, soft_wrap=True), live=sys.stderr.isatty(), transient=True)
        self._task = self._progress.add_task("starting", total=len(names))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def start(self, place: int) -> None:
        """The thing at this place runs."""
        self._running[place] = None
        self._show(0)

    def end(self, place: int) -> None:
        """The thing at this place is done."""
        del self._running[place]
        self._show(1)

    def _show(self, done: int) -> None:
        first = escape(self._names[next(iter(self._running))]) if self._running else ""
        more = f", and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        self._progress.update(self._task, advance=done, description=first + more)


def following(things: "Sequence[T]", name: "Callable[[T], str]") -> "Iterator[T]":
    """The things one after another, with a bar of how many are done and the name of the one at hand; shown on a terminal alone."""
    with _bars(Console(stderr=True, soft_wrap=True), live=sys.stderr.isatty(), transient=True) as bars:
        task = bars.add_task("", total=len(things))
        for done, thing in enumerate(things):
            bars.update(task, completed=done, description=escape(name(thing)))
            yield thing
