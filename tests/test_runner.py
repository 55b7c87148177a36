"""A sweep survives whatever a method does, keeps a record of it, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runner_support import PLUGIN, QUICK, suite, sweep

import attnbench
from attnbench import environment, registry, store
from attnbench.case import Case
from attnbench.case import names as case_names
from attnbench.cell import CellRunner
from attnbench.method import Shape
from attnbench.record import Record, Status


@pytest.fixture(scope="module", autouse=True)
def _plugin():
    registry.add_plugins([PLUGIN])
    yield
    registry.registry.cache_clear()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Record]:
    names = ("biased", "unwritten", "narrow", "greedy", "hangs", "raises", "dies", "fallback", "absent", "eager")
    summary = sweep(suite(*(f"wrong@{n}" for n in names), n=(32, 64, 96)), tmp_path_factory.mktemp("results"))
    stored = store.read(summary.folder / store.RECORDS).records
    assert [r.to_json() for r in stored] == [r.to_json() for r in summary.records]
    return {(r.case.implementation, r.case.n): r for r in stored}


@pytest.mark.parametrize(
    ("name", "n", "status", "reason"),
    [
        ("biased", 32, Status.INCORRECT, "out rms"),
        ("unwritten", 32, Status.INCORRECT, "out is not finite"),
        ("narrow", 32, Status.INCORRECT, "output has shape"),
        ("greedy", 32, Status.OK, ""),
        ("greedy", 64, Status.OOM, "allocate"),
        ("greedy", 96, Status.SKIPPED, "oom at N = 64"),
        ("hangs", 64, Status.TIMEOUT, "within 6 s"),
        ("hangs", 96, Status.SKIPPED, "timeout at N = 64"),
        ("raises", 96, Status.ERROR, "RuntimeError: a kernel that cannot"),
        ("dies", 96, Status.ERROR, "exited with 7"),
        ("fallback", 32, Status.INCORRECT, "none of aten::_scaled_dot_product_flash_attention_for_cpu ran"),
        ("absent", 32, Status.UNSUPPORTED, "a-package-nobody-has is not installed"),
        ("eager", 96, Status.OK, ""),
    ],
)
def test_every_fate_is_a_record(outcome: dict[tuple[str, int], Record], name: str, n: int, status: Status, reason: str) -> None:
    record = outcome[name, n]
    assert record.status is status
    assert reason in "; ".join(record.reasons)
    assert (record.timing is not None) == (status is Status.OK)


def test_an_ok_record_is_complete(outcome: dict[tuple[str, int], Record]) -> None:
    record = outcome["eager", 96]
    assert record.implementation == "eager"
    assert len(record.timing.samples_s) >= 3
    assert min(record.timing.samples_s) > 0
    assert record.memory.output_bytes == 2 * 96 * 8 * 4
    assert record.memory.peak_bytes >= record.memory.output_bytes
    assert record.gate.passed
    assert record.gate.deterministic
    assert set(record.gate.errors) == {"out rms", "out max"}
    assert len(record.input_hash) == 16
    assert record.case.case_id == Record.from_json(record.to_json()).case.case_id


def test_oom_says_how_much_it_wanted(outcome: dict[tuple[str, int], Record]) -> None:
    assert outcome["greedy", 64].wanted_bytes == 1 << 46


def test_the_command_of_a_record_runs_its_cell_again(outcome: dict[tuple[str, int], Record]) -> None:
    from attnbench.cli._options import read_axes, read_settings

    words = outcome["eager", 96].command.split()
    axes = read_axes([words[i + 1] for i, w in enumerate(words) if w == "--axis"])
    settings = read_settings([words[i + 1] for i, w in enumerate(words) if w == "--set"])
    again = suite("wrong@eager", n=(1,)).override(axes, ["wrong@eager"], settings).expand()
    assert [c.case_id for c in again] == [outcome["eager", 96].case.case_id]


@pytest.mark.parametrize("name", [m for m in attnbench.methods() if attnbench.get(m).weights])
def test_learned_parameters_reach_every_implementation_also_where_there_are_none(name: str) -> None:
    method, shape = attnbench.get(name), Shape(1, 2, 64, 8)
    params = method.params().fitted(shape)
    values = tuple(sorted(params.as_dict().items()))
    for implementation in method.all_implementations():
        if method.reasons(implementation, shape, torch.float32, "cpu", params, backward=True):
            continue
        case = Case(
            task="speed", method=name, implementation=implementation.name, params=values, heads=2, n=64, dim=8, mode="forward+backward"
        )
        record = CellRunner("cpu", QUICK).attempt(case)
        assert record.status is Status.OK, record.reasons
        assert record.learned == sum(x.numel() for x in method.initial(shape, params, torch.empty(0)).values())


def test_resume_runs_only_what_is_left(tmp_path: Path) -> None:
    first = sweep(suite("wrong@eager", n=(16, 32)), tmp_path)
    again = sweep(suite("wrong@eager", "softmax", n=(16, 32, 48)), tmp_path, resume=True)
    assert (first.counts[Status.OK], again.resumed, again.counts[Status.OK]) == (2, 2, 4)
    records = store.read(again.folder / store.RECORDS).records
    assert len({r.case.case_id for r in records}) == len(records) == 6


def test_resume_says_what_is_run_again_for_being_of_another_environment(tmp_path: Path) -> None:
    s, told = suite("wrong@eager", n=(16, 32)), []
    first = sweep(s, tmp_path)
    known, here = first.folder / store.ENVIRONMENTS, first.records[0].env_id
    facts = store.environments(first.folder / store.RECORDS)[here]
    for path in (known, first.folder / store.RECORDS):
        path.write_text(path.read_text().replace(here, "elsewhere"))
    known.write_text(known.read_text().replace(f'"threads": {facts["threads"]}', '"threads": 99'))
    again = sweep(replace(s, axes={**s.axes, "n": (16, 32, 48)}), tmp_path, resume=True, tell=told.append)
    assert (again.resumed, again.counts[Status.OK]) == (0, 3)
    assert [e.message for e in told if e.kind == "note"] == [
        f"2 of these cells were settled in another environment (threads = 99 there, {facts['threads']} here): they run again"
    ]
    told.clear()
    assert sweep(s, tmp_path, resume=True, tell=told.append).resumed == 2
    assert not [e for e in told if e.kind == "note"]


def test_cells_of_several_other_environments_are_counted_once(tmp_path: Path) -> None:
    s, told = suite("wrong@eager", n=(16, 32, 48)), []
    file = sweep(s, tmp_path).folder / store.RECORDS
    lines = file.read_text().splitlines()
    here = json.loads(lines[0])["env_id"]
    lines = [line.replace(here, f"elsewhere{min(i, 1)}") for i, line in enumerate(lines)]
    file.write_text("\n".join([*lines, lines[0].replace("elsewhere0", "elsewhere1")]) + "\n")
    sweep(s, tmp_path, resume=True, tell=told.append)
    assert [e.message for e in told if e.kind == "note"] == ["3 of these cells were settled in another environment: they run again"]


def test_resume_says_which_plugins_changed_after_their_cells_were_settled(tmp_path: Path) -> None:
    told, s = [], suite("wrong@eager", "softmax")
    first = sweep(s, tmp_path)
    sweep(s, tmp_path, resume=True, tell=told.append)
    assert not [e for e in told if e.kind == "note"]
    file = first.folder / store.RECORDS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "started": "2000-01-01T00:00:00+00:00"}) + "\n" for line in lines))
    assert sweep(s, tmp_path, resume=True, tell=told.append).resumed == len(lines)
    (note,) = [e.message for e in told if e.kind == "note"]
    assert sweep(suite("softmax"), tmp_path, resume=True, tell=told.append).resumed
    assert [e.message for e in told if e.kind == "note"] == [note], "no cell of the plugin was asked for"
    assert note.endswith("wrong.py was changed after cells of it were settled, which are left alone: leave out --resume to run them again")


def test_names_tell_cells_apart() -> None:
    cases = suite("softmax", "topk", heads=(1, 2), n=(32,)).expand()
    told = case_names(cases)
    assert len(set(told.values())) == len(cases) == 4
    assert "softmax N=32 forward heads=1" in told.values()
    one = [Case(task="speed", method="topk", params=(("causal", False), ("topk", k)), n=16) for k in (4, 8)]
    assert list(case_names(one).values()) == ["topk N=16 forward topk=4", "topk N=16 forward topk=8"]
    trained = [Case(task="accuracy", method="softmax", data="mqar", seed=seed, heads=heads) for seed in (0, 1) for heads in (1, 2)]
    assert case_names(trained)[trained[1]] == "softmax N=1024 mqar seed=0 heads=2"


def test_what_differs_between_environments_is_named_with_packages_and_what_is_known_of_a_gpu() -> None:
    there = {"os": "a", "packages": {"torch": "1", "triton": "2"}, "gpu": {"driver": "5"}, "ceilings": {"copy_bytes_per_s": 1.0}}
    here = {"os": "a", "packages": {"torch": "1", "timm": "3"}, "gpu": {"driver": "6"}, "ceilings": {"copy_bytes_per_s": 2.0}}
    assert sorted(environment.changes(there, here)) == [
        "driver = '5' there, '6' here",
        "timm = None there, '3' here",
        "triton = '2' there, None here",
    ]
    assert environment.changes(here, here) == []
    builds = [{"torch": f"2+{build}", "packages": {"torch": "2"}} for build in ("cpu", "cu130")]
    assert environment.changes(*builds) == ["torch = '2+cpu' there, '2+cu130' here"], "the build, not the package's version alone"


def test_resume_tries_errors_again_but_not_what_was_too_large(tmp_path: Path) -> None:
    s = suite("wrong@greedy", "wrong@raises", n=(64, 80))
    sweep(s, tmp_path)
    again = sweep(s, tmp_path, resume=True)
    assert again.counts == {Status.ERROR: 2, Status.SKIPPED: 1}
    (error,) = {r.reasons for r in again.records if r.status is Status.ERROR}
    assert error == ("RuntimeError: a kernel that cannot (wrong.py, line 45)",)
    retried = sweep(s, tmp_path, resume=True, retry=True)
    assert retried.counts[Status.OOM] == 1


def test_backward_mode_checks_and_measures_gradients(tmp_path: Path) -> None:
    summary = sweep(suite("softmax@eager", mode=("forward+backward",)), tmp_path)
    (record,) = summary.records
    assert record.status is Status.OK
    assert {"dq rms", "dk max", "dv rms"} <= set(record.gate.errors)
    assert record.memory.saved_bytes > 0


def test_fidelity_measures_distance_from_softmax(tmp_path: Path) -> None:
    s = replace(suite("softmax@eager", "linear", n=(64,), profile=("needle",)), task="fidelity")
    by_method = {r.case.method: r.metrics for r in sweep(s, tmp_path).records}
    assert by_method["softmax"]["rel_error"] < 1e-5
    assert by_method["softmax"]["mass_recalled"] == pytest.approx(1.0, abs=1e-5)
    assert by_method["softmax"]["top1_agreement"] == 1.0
    assert by_method["linear"]["rel_error"] > 0.5
    assert "mass_recalled" not in by_method["linear"]


SCRIPT = """
import sys
from pathlib import Path
from attnbench import runner
from attnbench.protocol import Protocol
from attnbench.suite import Entry, Suite
if __name__ == "__main__":
    axes = {"n": tuple(range(16, 56)), "heads": (2,), "dim": (8,), "dtype": ("float32",)}
    s = Suite("trial", "", "", "speed", (Entry("softmax@eager"),), axes, Protocol(budget_s=0.02, max_samples=4, aa=False))
    runner.sweep(s, Path(sys.argv[1]), device="cpu", resume=True, tell=lambda e: print(e.kind, flush=True))
"""


def test_kill_in_the_middle_then_resume_loses_and_doubles_nothing(tmp_path: Path) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT)
    results = tmp_path / "results"
    process = subprocess.Popen([sys.executable, str(script), str(results)], stdout=subprocess.PIPE, text=True)
    finished = 0
    for line in process.stdout:
        finished += line.strip() == "record"
        if finished == 5:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (file,) = results.rglob(store.RECORDS)
    with file.open("ab") as f:  # what a kill inside a write leaves
        f.write(b'{"schema":1,"case_id":"0123')
    before = store.read(file)
    assert before.torn == 27
    assert 5 <= len(before.records) < 40
    time.sleep(0.2)
    subprocess.run([sys.executable, str(script), str(results)], check=True, capture_output=True, timeout=200)
    after = store.read(file)
    assert after.torn == 0
    assert sorted(r.case.n for r in after.records) == list(range(16, 56))
    assert [r.to_json() for r in after.records][: len(before.records)] == [r.to_json() for r in before.records]


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    children = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(_alive(p) for p in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(p) for p in children)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_record_refuses_time_for_what_failed() -> None:
    with pytest.raises(ValueError, match="may not hold measurements"):
        Record(Case(task="speed", method="softmax"), Status.OOM, "e", metrics={"x": 1.0})


def test_json_lines_are_json(outcome: dict[tuple[str, int], Record]) -> None:
    for record in outcome.values():
        assert json.loads(record.to_json())["case_id"] == record.case.case_id
