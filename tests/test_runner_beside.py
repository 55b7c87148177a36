"""Cells beside each other and cells that train: processes, memory, timeouts and what is told on the way."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cli_support import call
from runner_support import QUICK, suite, sweep

from attnbench import cell, executor, isolate, registry, runner, store
from attnbench.case import Case
from attnbench.cli._progress import Reporter
from attnbench.errors import UserError
from attnbench.record import Record, Status
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from pathlib import Path

TINY = {
    "n": (32,), "batch": (4,), "heads": (2,), "dim": (4,), "data": ("mqar",), "depth": (1,), "rates": ("0.001",), "dtype": ("float32",),
}  # fmt: skip


def training(*methods: str, timeout_s: float = 60.0, **axes: tuple) -> Suite:
    return Suite("learn", "", "", "accuracy", tuple(Entry(m) for m in methods), {**TINY, **axes}, replace(QUICK, timeout_s=timeout_s))


def test_cells_that_train_run_side_by_side_into_one_store(tmp_path: Path) -> None:
    s, told = training("softmax", "linear", steps=(3,), seed=(0, 1)), []
    summary = sweep(s, tmp_path, concurrent=2, tell=told.append)
    assert summary.counts == {Status.OK: 4}
    records = store.read(summary.folder / store.RECORDS).records
    assert {(r.case.method, r.case.seed) for r in records} == {(m, i) for m in ("softmax", "linear") for i in (0, 1)}
    kinds = [event.kind for event in told]
    assert kinds.index("record") > 1, "two cells start before the first ends"
    alone = {r.case.case_id: r.metrics["test_loss"] for r in sweep(s, tmp_path / "alone").records}
    assert {r.case.case_id: r.metrics["test_loss"] for r in records} == alone
    assert sweep(s, tmp_path, concurrent=2, resume=True).resumed == 4


def test_a_resumed_run_takes_over_what_another_suite_has_trained(tmp_path: Path) -> None:
    first = sweep(training("softmax", "linear", steps=(3,)), tmp_path)
    other, told = replace(training("softmax", "mita", steps=(1, 3)), name="other"), []
    fresh = sweep(other, tmp_path / "fresh")
    assert (fresh.resumed, len(fresh.records)) == (0, 4)
    again = sweep(other, tmp_path, resume=True, tell=told.append)
    assert (again.resumed, len(again.records)) == (1, 3), "softmax after three steps was trained by the first suite"
    assert [e.message for e in told if e.kind == "note"] == ["taken over from suite learn: 1 of the same cells, trained there"]
    (own,) = [r for r in store.read(again.folder / store.RECORDS).records if r.case in {x.case for x in first.records}]
    (theirs,) = [r for r in first.records if r.case == own.case]
    assert replace(own, command="") == replace(theirs, command="")
    assert own.command.startswith("attnbench run other ")
    assert sweep(other, tmp_path, resume=True).resumed == 4, "taken over once"


def test_models_are_trained_anew_without_resume_alone(tmp_path: Path) -> None:
    s = training("softmax", "topk", steps=(3,), trained_with=("softmax",))

    def swept(**options: Any) -> tuple[int, ...]:
        folder = sweep(s, tmp_path, **options).folder.parent / runner.CHECKPOINTS
        return tuple(path.stat().st_mtime_ns for path in folder.glob("*.pt"))

    first, again = swept(), swept()
    assert len(first) == len(again) == 1
    assert first != again
    s = replace(s, methods=(*s.methods, Entry("linear")))
    assert swept(resume=True) == again


def test_nothing_is_taken_over_without_resume_or_of_another_environment(tmp_path: Path) -> None:
    first = sweep(training("softmax", steps=(3,)), tmp_path)
    other = replace(training("softmax", steps=(3,)), name="other")
    assert sweep(other, tmp_path).resumed == 0
    file = first.folder / store.RECORDS
    file.write_text(file.read_text().replace(first.records[0].env_id, "elsewhere"))
    last = replace(other, name="last")
    (tmp_path / "other").rename(tmp_path / "gone")
    for records in (tmp_path / "gone").rglob(store.RECORDS):
        records.unlink()
    assert sweep(last, tmp_path, resume=True).resumed == 0


def test_a_damaged_suite_beside_stops_no_run(tmp_path: Path) -> None:
    first = sweep(training("softmax", steps=(3,)), tmp_path)
    file, told = first.folder / store.RECORDS, []
    damaged = tmp_path / "damaged" / first.folder.name / store.RECORDS
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no record\n" + file.read_text())
    last = sweep(replace(training("softmax", steps=(3,)), name="last"), tmp_path, resume=True, tell=told.append)
    notes = [e.message for e in told if e.kind == "note"]
    assert (last.resumed, len(notes)) == (1, 2)
    assert notes[0].startswith("nothing is taken over: ")
    assert "damaged" in notes[0]
    assert notes[1].startswith("taken over from suite learn: 1")


def test_cells_of_plugins_are_never_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [registry.built_in(name) for name in ("mita", "mita@triton", "crash", "nothing")] == [True, True, False, False]
    sweep(training("softmax", "mita", steps=(3,)), tmp_path)
    other = replace(training("softmax", "mita", steps=(3,)), name="other")
    monkeypatch.setattr(registry, "built_in", lambda name: name == "softmax")
    assert sweep(other, tmp_path, resume=True).resumed == 1, "mita may be another one now"
    swapped = replace(training("softmax", steps=(3,), trained_with=("mita",)), name="swapped")
    sweep(swapped, tmp_path)
    assert sweep(replace(swapped, name="again"), tmp_path, resume=True).resumed == 0


def test_cells_that_are_timed_never_run_side_by_side(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="suite trial times its cells, which would slow each other down: leave out --concurrent"):
        sweep(suite("softmax"), tmp_path, concurrent=2)
    assert not list(tmp_path.iterdir())


def test_cells_without_clocks_run_side_by_side_and_are_timed_later(tmp_path: Path) -> None:
    untimed = suite("softmax", "linear", protocol=replace(QUICK, timed=False))
    first = sweep(untimed, tmp_path, concurrent=2)
    assert first.counts == {Status.OK: 2}
    assert all(r.timing is None and r.gate.passed and r.memory for r in first.records)
    assert sweep(untimed, tmp_path, resume=True).resumed == 2
    (file,) = store.find(tmp_path)
    assert all("ceilings" not in known for known in store.environments(file).values())
    timed = sweep(suite("softmax", "linear"), tmp_path, resume=True)
    assert timed.resumed == 0
    assert all(r.timing for r in timed.records)
    assert sweep(untimed, tmp_path, resume=True).resumed == 2
    assert all(known["ceilings"]["copy_bytes_per_s"] > 0 for known in store.environments(file).values())
    with pytest.raises(UserError, match="breakdown is of calls that are timed"):
        replace(untimed.protocol, breakdown=True)


def test_the_command_line_refuses_to_time_cells_side_by_side(tmp_path: Path) -> None:
    for words in (["quick"], ["accuracy", "--executor", "ray"]):
        result = call("run", *words, "--device", "cpu", "--concurrent", "2", "--results", tmp_path)
        assert result.exit_code == 2
        assert "--concurrent" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cells_that_train_have_bars_of_their_own() -> None:
    made = [Case(task="accuracy", method=name) for name in ("softmax", "linear")]
    with Reporter(quiet=True) as reporter:
        for case in made:
            reporter(runner.Event("start", 0, 2, case, name=str(case)))
            step = isolate.Progress(30, 100, "loss 1.5, accuracy 0.25 at rate 0.001")
            reporter(runner.Event("progress", 0, 2, case, progress=step, name=str(case)))
        bars = [(t.completed, t.total, t.description) for t in reporter._progress.tasks]
        assert [bar[:2] for bar in bars] == [(0, 2), (30, 100), (30, 100)]
        assert "loss 1.5, accuracy 0.25" in bars[1][2]
        reporter(runner.Event("record", 1, 2, made[0], Record(made[0], Status.OK, "")))
        assert [t.completed for t in reporter._progress.tasks] == [1, 30]


def test_a_cell_without_memory_beside_others_runs_again_alone() -> None:
    ran: list[tuple[str, list[str]]] = []
    beside: list[str] = []
    both = threading.Barrier(2)

    class Full:
        hear = None

        def run(self, case: Case) -> Record:
            beside.append(case.method)
            if len(ran) < 2:
                both.wait(20)
            ran.append((case.method, list(beside)))
            beside.remove(case.method)
            full = case.method == "large" and [name for name, _ in ran].count("large") == 1
            return Record(case, Status.OOM if full else Status.OK, "")

    place = executor.Several([Full(), Full()])
    large, small, last = (Case(task="accuracy", method=name) for name in ("large", "small", "last"))
    place.submit(small)
    place.submit(large)
    assert place.free == 0
    ended = place.wait() + place.wait()
    assert [r.case for r in ended] == [small]
    assert place.free == 0, "nothing starts beside a cell that waits for the whole device"
    ended += place.wait()
    assert {r.case.method: r.status for r in ended} == {"small": Status.OK, "large": Status.OK}
    assert ran[-1] == ("large", ["large"])
    assert "runs again alone" in place.notes[0]
    assert place.free == 2
    place.submit(last)
    assert [r.case for r in place.wait()] == [last]


def test_a_cell_that_trains_goes_on_after_its_timeout_for_as_long_as_that_adds_steps() -> None:
    made = Case(task="accuracy", method="softmax")

    def record(**changes: object) -> Record:
        return Record(made, Status.TIMEOUT, "e", limit_s=10.0, **changes)

    assert not store.done([record(kept_steps=40)], "e", 10.0)
    assert store.done([record(kept_steps=40), record()], "e", 10.0), "an attempt that added nothing settles it"
    assert not store.done([record()], "e", 20.0)
    assert Record.from_json(record(kept_steps=40).to_json()) == record(kept_steps=40)
    assert "kept_steps" not in record().to_json()


def reporting(_: str) -> Any:
    """The job of a worker: says how far it is, then hangs or answers."""

    def job(message: str) -> isolate.Reply:
        isolate.report(isolate.Progress(3, 10, "half way", kept=2, gained=message == "gain"))
        if message != "answer":
            time.sleep(600)
        return isolate.Reply("done")

    return job


def test_what_a_worker_reports_is_heard_before_its_answer() -> None:
    worker, heard = isolate.Worker(reporting, ("",)), []
    try:
        assert worker.run("answer", 60, heard.append) == "done"
        assert [p.text for p in heard] == ["half way"]
        with pytest.raises(isolate.WorkerHungError, match="within 1 s"):
            worker.run("hang", 1, heard.append)
    finally:
        worker.stop()


@pytest.mark.parametrize(("message", "kept"), [("gain", 2), ("hang", None)])
def test_a_timeout_says_how_many_steps_this_attempt_left(message: str, kept: int | None) -> None:
    told = []
    cells = executor.Cells("cpu", replace(QUICK, timeout_s=1.0), hear=lambda case, progress: told.append((case, progress.done)))
    cells._measuring = isolate.Worker(reporting, ("",))
    made = Case(task="accuracy", method=message)
    cells._measuring.run = partial(_as_method, cells._measuring.run)  # the worker takes words here
    try:
        record = cells.run(made)
    finally:
        cells.stop()
    assert record.status is Status.TIMEOUT
    assert record.kept_steps == kept
    assert told == [(made, 3)]
    assert ("2 of 10 steps are kept: --resume goes on there" in record.reasons) == (kept is not None)


def _as_method(run: Any, case: Case, *rest: Any) -> Any:
    return run(case.method, *rest)


def test_a_cell_that_is_told_to_go_on_keeps_no_longer_length_from_running(tmp_path: Path) -> None:
    made = [Case(task="accuracy", method="softmax", n=n) for n in (32, 64)]
    for kept, skipped in ((5, False), (None, True)):
        place = Stopping(kept)
        cases = dict.fromkeys(made, ())
        with store.Store(tmp_path / str(kept)) as target:
            summary = runner._Sweep(training("softmax"), "cpu", "e", place, target, lambda _: None, (), cases).run(
                resume=False, retry=False
            )
        assert (summary.counts[Status.SKIPPED] == 1) == skipped


class Stopping:
    """A place where every cell outruns its time."""

    def __init__(self, kept: int | None) -> None:
        self.kept, self.notes, self.case = kept, [], None

    free = property(lambda self: int(self.case is None))

    def listen(self, hear: Any) -> None: ...

    def submit(self, case: Case) -> None:
        self.case = case

    def wait(self) -> list[Record]:
        case, self.case = self.case, None
        return [Record(case, Status.TIMEOUT, "", limit_s=1.0, kept_steps=self.kept)]


def test_an_attempt_that_asks_for_less_has_nothing_taken_apart_again(tmp_path: Path) -> None:
    whole = suite("softmax", protocol=replace(QUICK, breakdown=True))
    assert [bool(r.breakdown) for r in sweep(whole, tmp_path).records] == [True]
    sweep(suite("softmax"), tmp_path)
    assert sweep(whole, tmp_path, resume=True).resumed == 1


def test_processes_beside_each_other_take_the_gpus_that_are_alike_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["H200", "display", "H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    assert [cell._gpu(number) for number in range(5)] == [0, 2, 0, 2, 0]
    place = runner._here(suite("softmax", protocol=replace(QUICK, timed=False)), "cuda", [], tmp_path, 3)
    assert [cells.number for cells in place.cells] == [0, 1, 2]
    assert [cells._measuring.arguments[-1] for cells in place.cells] == [0, 1, 2]
