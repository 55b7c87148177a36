"""A sweep: the cases of a suite, each in a worker process, each attempt a record on disk as soon as it ends."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from attnbench import environment, executor, inputs, registry, resuming, store
from attnbench.case import TRAINED, Case, names, other_method
from attnbench.energy import ABSENT
from attnbench.errors import UserError
from attnbench.record import Record, Status
from attnbench.tasks.learning import DRAWN
from attnbench.tasks.swapped import forget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from attnbench.executor import Executor
    from attnbench.isolate import Progress
    from attnbench.shard import Shard
    from attnbench.suite import Suite

CHECKPOINTS = ".checkpoints"
"""Folder of a suite's results where models lie that are being trained, and those that other cells need."""
_TOO_LARGE = (Status.OOM, Status.TIMEOUT)
_NO_FAULT = (Status.OK, Status.UNSUPPORTED, Status.SKIPPED, Status.DIVERGED)


@dataclass(frozen=True)
class Event:
    """Something that a sweep has to tell: a note, a cell that starts, how far a running one is, or a record that was written."""

    kind: Literal["note", "start", "progress", "record"]
    index: int
    """cells finished so far"""
    total: int
    case: Case | None = None
    record: Record | None = None
    message: str = ""
    progress: Progress | None = None
    name: str = ""
    """of the case among all of the sweep"""


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
        """Attempts that were neither measured, nor refused by limits, nor skipped for size, nor trained in vain."""
        return sum(n for status, n in self.counts.items() if status not in _NO_FAULT)


def sweep(
    suite: Suite,
    results: Path,
    *,
    device: str,
    resume: bool = False,
    retry: bool = False,
    plugins: Sequence[Path] = (),
    shard: Shard | None = None,
    place: Executor | None = None,
    concurrent: int = 1,
    tell: Callable[[Event], None] = lambda _: None,
) -> Summary:
    """Run every case of `suite`, or of a `shard` of it, and store a record of each under `results/<suite>/<device>/`.

    With `resume`, cells that earlier runs settled on this very environment are left alone (`retry`: only those that were measured or
    unsupported), but where the protocol asks for times, a breakdown or energy, those measured without are measured again. Cells run on this
    machine unless `place` says where, `concurrent` of them at once where nothing is timed. Raises `UserError` before anything runs where
    the suite or the folder is at fault; a failing cell is a record.
    """
    planned = suite.planned()
    cases = shard.take(planned) if shard else planned
    checkpoints = results / suite.name / CHECKPOINTS
    if place is None:
        for profile in {case.profile for case in cases}:
            inputs.hold(profile)
        place = _here(suite, device, plugins, checkpoints, concurrent)
    try:
        facts = place.start()
        with store.Store(store.folder(results, suite.name, facts["device"])) as target:
            place.notes[:0] = target.notes
            env_id = facts.pop("env_id")
            target.save_environment(env_id, facts)
            for case in cases if suite.task == TRAINED and not resume else ():
                forget(case, checkpoints)
            summary = _Sweep(suite, device, env_id, place, target, tell, tuple(plugins), cases).run(resume=resume, retry=retry)
        shutil.rmtree(checkpoints / DRAWN, ignore_errors=True)  # drawn again in seconds, where another sweep needs it
        return summary
    finally:
        place.stop()


def _here(suite: Suite, device: str, plugins: Sequence[Path], checkpoints: Path, concurrent: int) -> Executor:
    """This machine. Raises `UserError` where cells that are timed were to run beside each other."""
    if concurrent > 1 and suite.task != TRAINED and suite.protocol.timed:
        raise UserError(f"suite {suite.name} times its cells, which would slow each other down: leave out --concurrent, or add --untimed")
    cells = [executor.Cells(device, suite.protocol, tuple(plugins), checkpoints, number) for number in range(concurrent)]
    if concurrent == 1:
        return executor.Local(cells[0])
    return executor.Several(cells)


@dataclass
class _Sweep:
    suite: Suite
    device: str
    env_id: str
    place: Executor
    target: store.Store
    tell: Callable[[Event], None]
    plugins: tuple[Path, ...]
    cases: Mapping[Case, tuple[int, ...]]
    """each cell, and the budgets that it is the answer to"""
    exhausted: dict[str, Record] = field(default_factory=dict)
    """series -> the record of the least length at which it failed for size"""

    def __post_init__(self) -> None:
        self.summary = Summary(self.target.path)
        self.series = {case: store.series_of(case) for case in self.cases}
        self.names = names(self.cases)
        self.place.listen(self._hear)

    def run(self, *, resume: bool, retry: bool) -> Summary:
        """Run them in order, as many at once as the place takes, but the lengths of one series one after another."""
        if resume and self.suite.task == TRAINED:
            self._take_over()
        settled = self._settled(retry=retry) if resume else {}
        if resume:
            wanted, known = {case.case_id for case in self.cases}, store.environments(self.target.file)
            left, timeout_s = wanted - settled.keys(), self.suite.protocol.timeout_s
            self.place.notes += resuming.elsewhere(left, self.target.records(), known, self.env_id, timeout_s)
            self.place.notes += resuming.edited([record for key, record in settled.items() if key in wanted])
        waiting = dict.fromkeys(self._left(settled))
        busy: set[str] = set()
        while waiting or busy:
            self._pass_on_notes()
            case = next((c for c in waiting if self.series[c] not in busy), None) if self.place.free else None
            if case is None:
                for record in self.place.wait():
                    busy.discard(self.series[record.case])
                    self._finish(record)
                continue
            del waiting[case]
            self.tell(Event("start", self._finished, len(self.cases), case, name=self.names[case]))
            if skipped := self._skip(case):
                self._finish(skipped)
            else:
                self.place.submit(case)
                busy.add(self.series[case])
        self._pass_on_notes()
        return self.summary

    def _take_over(self) -> None:
        """Copy what other suites of these results hold of the very same cells: what training leads to is determined by the case.

        Cells of other methods than built-in ones are left out: what the name of a plugin stands for may have changed.
        """
        folder, kept = self.target.path, {r.case for r in self.target.records() if self._sound(r)}
        for file in sorted(f for f in folder.parent.parent.glob(f"*/{folder.name}/{store.RECORDS}") if f.parent != folder):
            found = [r for r in self._held(file) if r.case in self.cases and r.case not in kept]
            for record in found:
                self.target.append(self._complete(record))
                kept.add(record.case)
            if found:
                self.place.notes.append(f"taken over from suite {file.parent.parent.name}: {len(found)} of the same cells, trained there")

    def _held(self, file: Path) -> list[Record]:
        """What another suite holds that may be taken over; nothing of a file that is damaged or of another version."""
        try:
            return [r for r in store.latest(store.read(file).records) if self._sound(r) and _known(r.case)]
        except UserError as error:
            self.place.notes.append(f"nothing is taken over: {error}")
            return []

    def _sound(self, record: Record) -> bool:
        return record.env_id == self.env_id and record.status is Status.OK

    def _settled(self, *, retry: bool) -> dict[str, Record]:
        """What earlier runs need not have done again, by case."""
        tried = [r for r in self.target.records() if r.env_id == self.env_id]
        settled = store.done(tried, self.env_id, self.suite.protocol.timeout_s)
        if retry:
            settled = {key: r for key, r in settled.items() if r.status not in _TOO_LARGE}
        if self.suite.protocol.timed and self.suite.task != TRAINED:
            settled = {key: r for key, r in settled.items() if r.timing or r.status is not Status.OK}
        # an attempt that asked for less takes nothing away from an earlier one: see `frame.load`
        if self.suite.protocol.breakdown:
            apart = {(r.case, r.implementation) for r in tried if r.breakdown}
            settled = {key: r for key, r in settled.items() if (r.case, r.implementation) in apart or r.status is not Status.OK}
        if self.suite.protocol.energy:
            metered = {(r.case, r.implementation) for r in tried if r.energy or _unmetered(r)}
            settled = {key: r for key, r in settled.items() if (r.case, r.implementation) in metered or r.status is not Status.OK}
        return settled

    def _left(self, settled: Mapping[str, Record]) -> list[Case]:
        for case in self.cases:
            if case.case_id in settled:
                self.summary.resumed += 1
                self._remember(settled[case.case_id])
        return [case for case in self.cases if case.case_id not in settled]

    @property
    def _finished(self) -> int:
        return self.summary.resumed + len(self.summary.records)

    def _hear(self, case: Case, progress: Progress) -> None:
        self.tell(Event("progress", self._finished, len(self.cases), case, progress=progress, name=self.names[case]))

    def _pass_on_notes(self) -> None:
        while self.place.notes:
            self.tell(Event("note", self._finished, len(self.cases), message=self.place.notes.pop(0)))

    def _finish(self, record: Record) -> None:
        """Complete the record, and write it before anything else happens."""
        case, record = record.case, self._complete(record)
        self._remember(record)
        self.target.append(record)
        self.summary.counts[record.status] += 1
        self.summary.records.append(record)
        self.tell(Event("record", self._finished, len(self.cases), case, record, name=self.names[case]))

    def _complete(self, record: Record) -> Record:
        """With where it ran, and how to run it again."""
        asked, source = self.cases[record.case], self.suite.source or self.suite.name
        again = command(source, record.case, self.device, self.plugins, asked)
        return replace(record, env_id=self.env_id, command=again, budget=asked)

    def _remember(self, record: Record) -> None:
        if record.status in _TOO_LARGE and record.kept_steps is None:
            key = store.series_of(record.case)
            before = self.exhausted.get(key)
            if before is None or record.case.n < before.case.n:
                self.exhausted[key] = record

    def _skip(self, case: Case) -> Record | None:
        before = self.exhausted.get(self.series[case])
        if before is None or before.case.n > case.n:
            return None
        reasons = (f"{before.status} at N = {before.case.n}",)
        return Record(case, Status.SKIPPED, "", reasons=reasons, started=executor.now(), commit=environment.commit())


def _unmetered(record: Record) -> bool:
    """Whether the record says why it has no energy."""
    return any(reason.startswith(ABSENT) for reason in record.reasons)


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
        if case.task == TRAINED or name in case.as_dict():
            words += ["--axis", f"{name}={_word(getattr(case, name))}"]
    for name, value in case.params:
        words += ["--set", f"{case.method}.{name}={_word(value)}"]
    return " ".join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _known(case: Case) -> bool:
    """Whether the methods of a cell that trains are built in."""
    return registry.built_in(case.method) and (not case.trained_with or registry.built_in(other_method(case.trained_with)[0].name))
