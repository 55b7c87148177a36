"""A sweep: the cases of a suite, each in a worker process, each attempt a record on disk before the next begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from attnbench import breakdown, cell, environment, store
from attnbench.isolate import Worker, WorkerDiedError, WorkerHungError
from attnbench.record import Record, Status
from attnbench.suite import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from attnbench.record import Breakdown
    from attnbench.suite import Suite

_TOO_LARGE = (Status.OOM, Status.TIMEOUT)


@dataclass(frozen=True)
class Event:
    """Something that a sweep has to tell: a note, a cell that starts, or a record that was written."""

    kind: Literal["note", "start", "record"]
    index: int
    """cells finished so far"""
    total: int
    case: Case | None = None
    record: Record | None = None
    message: str = ""


@dataclass
class Summary:
    """What a sweep did."""

    folder: Path
    counts: Counter[Status] = field(default_factory=Counter)
    """attempts of this run, by status"""
    resumed: int = 0
    """cells that an earlier run had settled"""
    records: list[Record] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Attempts that were neither measured, nor refused by limits, nor skipped for size."""
        return sum(n for status, n in self.counts.items() if status not in (Status.OK, Status.UNSUPPORTED, Status.SKIPPED))


def sweep(
    suite: Suite,
    results: Path,
    *,
    device: str,
    resume: bool = False,
    retry: bool = False,
    plugins: Sequence[Path] = (),
    tell: Callable[[Event], None] = lambda _: None,
) -> Summary:
    """Run every case of `suite` and store a record of each under `results/<suite>/<device>/`.

    With `resume`, cells that earlier runs settled on this very environment are left alone (`retry`: only those that were measured or
    unsupported), but where the protocol asks for a breakdown, those measured without one are measured again. Raises `UserError` before
    anything runs where the suite or the folder is at fault; a failing cell is a record.
    """
    cases = suite.planned()
    worker, profiled = (Worker(job, (device, suite.protocol, tuple(plugins))) for job in (cell.setup, breakdown.setup))
    try:
        facts = worker.run(cell.ENVIRONMENT, 600)
        with store.Store(store.folder(results, suite.name, facts["device"])) as target:
            for note in target.notes:
                tell(Event("note", 0, len(cases), message=note))
            env_id = facts.pop("env_id")
            target.save_environment(env_id, facts)
            return _Sweep(suite, device, env_id, worker, profiled, target, tell, tuple(plugins), cases).run(resume=resume, retry=retry)
    finally:
        worker.stop()
        profiled.stop()


@dataclass
class _Sweep:
    suite: Suite
    device: str
    env_id: str
    worker: Worker
    profiled: Worker
    """takes cells apart; another process, because a profiler that was once on may slow down what is timed later"""
    target: store.Store
    tell: Callable[[Event], None]
    plugins: tuple[Path, ...]
    cases: Mapping[Case, tuple[int, ...]]
    """each cell, and the budgets that it is the answer to"""
    exhausted: dict[str, Record] = field(default_factory=dict)
    """series -> the record of the length at which it failed for size"""

    @property
    def total(self) -> int:
        """Cells."""
        return len(self.cases)

    def run(self, *, resume: bool, retry: bool) -> Summary:
        """Run them in order."""
        summary = Summary(self.target.path)
        settled = store.done(self.target.records(), self.env_id, self.suite.protocol.timeout_s) if resume else {}
        if retry:
            settled = {key: r for key, r in settled.items() if r.status not in _TOO_LARGE}
        if self.suite.protocol.breakdown:
            settled = {key: r for key, r in settled.items() if r.breakdown or r.status is not Status.OK}
        for index, case in enumerate(self.cases):
            if case.case_id in settled:
                summary.resumed += 1
                self._remember(settled[case.case_id])
                continue
            self.tell(Event("start", index, self.total, case))
            record = self._attempt(case)
            self._remember(record)
            self.target.append(record)
            summary.counts[record.status] += 1
            summary.records.append(record)
            self.tell(Event("record", index + 1, self.total, case, record))
        return summary

    def _remember(self, record: Record) -> None:
        if record.status in _TOO_LARGE:
            self.exhausted.setdefault(store.series_of(record.case), record)

    def _attempt(self, case: Case) -> Record:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        record = self._skip(case) or self._run(case)
        return replace(
            record,
            env_id=self.env_id,
            started=started,
            commit=environment.commit(),
            command=command(self.suite.source or self.suite.name, case, self.device, self.plugins, self.cases[case]),
            budget=self.cases[case],
        )

    def _skip(self, case: Case) -> Record | None:
        before = self.exhausted.get(store.series_of(case))
        if before is None or before.case.n > case.n:
            return None
        return Record(case, Status.SKIPPED, self.env_id, reasons=(f"{before.status} at N = {before.case.n}",))

    def _run(self, case: Case) -> Record:
        limit = self.suite.protocol.timeout_s
        try:
            record: Record = self.worker.run(case, limit)
        except WorkerHungError as error:
            return Record(case, Status.TIMEOUT, self.env_id, reasons=(str(error),), limit_s=limit)
        except WorkerDiedError as error:
            return Record(case, Status.ERROR, self.env_id, reasons=(str(error),))
        return self._taken_apart(record) if self.suite.protocol.breakdown and record.status is Status.OK else record

    def _taken_apart(self, record: Record) -> Record:
        """The record with a breakdown, or with the reason why there is none; its measurements stand either way."""
        try:
            parts: Breakdown | str = self.profiled.run(record, self.suite.protocol.timeout_s)
        except (WorkerHungError, WorkerDiedError) as error:
            parts = str(error)
        return replace(record, reasons=(f"no breakdown: {parts}",)) if isinstance(parts, str) else replace(record, breakdown=parts)


_DEFAULTS = {f.name: f.default for f in fields(Case)}


def command(suite: str, case: Case, device: str, plugins: Sequence[Path] = (), budgets: Sequence[int] = ()) -> str:
    """The command that runs this cell again; it names every parameter, so that `budgets` say only what they were the answer to."""
    axes = [name for name in _DEFAULTS if name not in ("task", "method", "implementation", "params", "replicate")]
    words = [
        "attnbench",
        "run",
        suite,
        *(w for path in plugins for w in ("--plugin", str(path))),
        "--device",
        device,
        "--method",
        case.label,
    ]
    words += ["--budget", f"keys={','.join(map(str, budgets))}"] if budgets else []
    for name in axes:
        words += ["--axis", f"{name}={_word(getattr(case, name))}"]
    for name, value in case.params:
        words += ["--set", f"{case.method}.{name}={_word(value)}"]
    return " ".join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
