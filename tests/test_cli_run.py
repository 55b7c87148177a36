"""`attnbench run`: resume, failures, interruption, and what goes where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cli_support import answer, call

from attnbench import runner, store
from attnbench.case import Case
from attnbench.record import Record, Status


@pytest.mark.timeout(250)
def test_a_run_resumes_after_ctrl_c_and_its_results_merge(suite: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    words = [
        sys.executable,
        str(Path(__file__).parent.parent / "cli.py"),
        "run",
        str(suite),
        "--results",
        str(results),
        "--device",
        "cpu",
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker gets it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert json.loads(first)["status"] == "ok"
    assert "cells done, run again with --resume" in stderr
    assert "Traceback" not in stderr
    again = subprocess.run([*words, "--resume"], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert "settled before" in again.stderr
    records = [r for file in store.find(results) for r in store.read(file).records]
    assert Counter((r.case.method, r.case.n) for r in records) == Counter((m, n) for m in ("softmax", "topk") for n in (16, 32, 48, 64))
    assert {r.status for r in records} == {Status.OK}
    merged = call("merge", results, results, "--into", tmp_path / "merged")
    assert merged.stdout.strip() == str(tmp_path / "merged")
    assert "8 new records" in merged.stderr
    assert "0 new records" in call("merge", results, "--into", tmp_path / "merged").stderr
    compared = call("compare", "softmax", "topk", "--results", results)
    lines = compared.stdout.splitlines()
    assert len(lines) == 4
    assert "The noise floor is" not in compared.stderr, "none was measured"
    rows = answer("compare", results, results, "--json")
    assert {row["verdict"] for row in rows} == {"not separable"}


def sweeping(monkeypatch: pytest.MonkeyPatch, *statuses: Status, interrupt: bool = False) -> list[dict[str, Any]]:
    """Replace the sweep by one that tells of cells with these statuses; returns how it was called."""
    calls: list[dict[str, Any]] = []

    def sweep(chosen: Any, results: Path, *, tell: Any, **options: Any) -> runner.Summary:
        calls.append({"suite": chosen, "results": results, **options})
        records = [
            Record(Case(task="speed", method="softmax", n=i + 1), status, "e", reasons=("because",)) for i, status in enumerate(statuses)
        ]
        for i, record in enumerate(records):
            tell(runner.Event("start", i, len(records), record.case, name=str(record.case)))
            tell(runner.Event("record", i + 1, len(records), record.case, record, name=str(record.case)))
        if interrupt:
            raise KeyboardInterrupt
        return runner.Summary(results / "here", Counter(statuses), records=records)

    monkeypatch.setattr(runner, "sweep", sweep)
    return calls


def test_failed_cells_end_in_a_table_and_exit_code_1(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping(monkeypatch, Status.OK, Status.OOM, Status.UNSUPPORTED, Status.ERROR)
    result = call("run", suite, "--device", "cpu", "--quiet")
    assert result.exit_code == 1
    assert result.stdout.strip() == "results/here", "data alone goes to stdout"
    table = result.stderr[result.stderr.index("failed cells") :]
    assert table.count("because") == 2
    assert "unsupported" not in table


def test_unsupported_and_skipped_cells_are_no_failure(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping(monkeypatch, Status.OK, Status.UNSUPPORTED, Status.SKIPPED)
    result = call("run", suite, "--device", "cpu")
    assert result.exit_code == 0
    assert "1 ok, 1 unsupported, 1 skipped" in result.stderr


def test_a_run_that_measured_nothing_says_so_and_why(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping(monkeypatch, Status.UNSUPPORTED, Status.SKIPPED, Status.UNSUPPORTED)
    result = call("run", suite, "--device", "cpu", "--quiet")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == "nothing was measured: because (3 cells)"
    sweeping(monkeypatch, Status.UNSUPPORTED, Status.OK)
    assert "nothing was measured" not in call("run", suite, "--device", "cpu").stderr


def test_an_interruption_says_how_far_it_got(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping(monkeypatch, Status.OK, Status.OK, interrupt=True)
    result = call("run", suite, "--device", "cpu")
    assert result.exit_code == 130
    assert "interrupted: 2 cells done, run again with --resume" in result.stderr


def test_quiet_and_json_keep_progress_and_data_apart(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping(monkeypatch, Status.OK, Status.ERROR)
    loud, quiet, machine = (call("run", suite, "--device", "cpu", *extra) for extra in ([], ["--quiet"], ["--json"]))
    assert "[1/2] ok" in loud.stderr
    assert "[1/2] ok" not in quiet.stderr
    assert "[2/2] error" in quiet.stderr
    assert [json.loads(line)["status"] for line in machine.stdout.splitlines()] == ["ok", "error"]


def test_options_reach_the_sweep(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = sweeping(monkeypatch, Status.OK)
    more = [
        "--axis",
        "n=8,9",
        "--method",
        "topk",
        "--set",
        "topk.topk=2,3",
        "--timeout",
        "7",
        "--budget-s",
        "0.5",
        "--breakdown",
        "--retry",
        "--results",
        "there",
    ]
    assert call("run", suite, "--device", "cpu", *more).exit_code == 0
    assert call("run", suite, "--device", "cpu").exit_code == 0
    given, plain = calls
    assert {(c.method, dict(c.params)["topk"], c.n) for c in given["suite"].expand()} == {("topk", k, n) for k in (2, 3) for n in (8, 9)}
    assert (given["suite"].protocol.timeout_s, given["suite"].protocol.budget_s) == (7, 0.5)
    assert [run["suite"].protocol.breakdown for run in (given, plain)] == [True, False]
    assert (given["resume"], given["retry"], given["results"]) == (True, True, Path("there")), "--retry is a way to resume"
    assert (plain["resume"], plain["retry"], plain["results"]) == (False, False, Path("results"))
