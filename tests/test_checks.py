"""`attnbench check --concurrent`: which checks start first, what becomes of one whose process is lost, and interruption."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cli_support import call

from attnbench import dealing, get, isolate, registry
from attnbench.checks import Check, checks
from attnbench.contract import parts

if TYPE_CHECKING:
    from collections.abc import Callable

PLUGIN = """
import os, time
from dataclasses import replace
from pathlib import Path
from attnbench.method import Implementation
from attnbench.methods.softmax import METHOD as SOFTMAX

def sound(q, k, v, params):
    return SOFTMAX.reference(q, k, v, params)

def raises(q, k, v, params):
    if q.shape[2] == 63 and params.causal:
        raise RuntimeError("of its own making\\nand more")
    return sound(q, k, v, params)

def dies(q, k, v, params):
    print("last words", flush=True)
    os._exit(3)

def hangs(q, k, v, params):
    if q.shape[2] == 257:
        Path(__file__).with_name(f"{os.getpid()}.pid").touch()
        time.sleep(600)
    return sound(q, k, v, params)

METHOD = replace(
    SOFTMAX,
    name="failing",
    implementations=tuple(Implementation(f.__name__, f"{__name__}:{f.__name__}") for f in (sound, raises, dies, hangs)),
)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method with implementations that fail, in a file and in a registry of the test's own."""
    known = registry.registry()
    copy = registry.Registry(dict(known.found), {}, dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    path = tmp_path / "failing.py"
    path.write_text(PLUGIN)
    return path


def test_those_that_compile_come_first_one_of_each_implementation_in_turn() -> None:
    asked = [c for name in ("softmax", "spark", "mita") for c in checks(get(name), "cuda")]
    order = dealing.order(asked)
    assert sorted(order) == list(range(len(asked)))
    dealt = [asked[place] for place in order]
    triton = [("spark", "lists"), ("spark", "triton"), ("mita", "triton")]
    compiled = sum((c.method, c.implementation) in triton for c in asked)
    assert [(c.method, c.implementation) for c in dealt[:compiled]] == triton * (compiled // 3)
    assert {c.implementation for c in dealt[compiled:]} >= {"cudnn", "eager", "varlen"}
    contract = list(parts(get("spark")))
    assert dealing.order([*contract, *asked])[:compiled] == [len(contract) + place for place in order[:compiled]]
    spark = [c for c in dealt if (c.method, c.implementation) == ("spark", "lists")]
    assert spark == [c for c in asked if (c.method, c.implementation) == ("spark", "lists")]


@pytest.mark.timeout(120)
def test_a_check_whose_process_is_lost_has_failed_and_the_others_go_on(plugin: Path) -> None:
    registry.add_plugins([plugin])
    every = [c for c in checks(get("failing"), "cpu") if c.dtype == "float32"]
    asked = [
        c for c in every if (c.implementation, c.shape.n, c.causal) in {("dies", 63, True), ("hangs", 257, False), ("sound", 63, False)}
    ]
    started: list[int] = []
    found = dict(dealing.findings(asked, "cpu", 2, plugins=[plugin], timeout_s=5, hear=started.append))
    assert sorted(started) == sorted(found) == [0, 1, 2]
    sound, dies, hangs = (found[place] for place in range(3))
    assert (sound.verdict, sound.mode) == ("passed", "forward+backward")
    assert (dies.verdict, dies.mode, dies.what) == ("failed", "causal forward+backward", "worker exited with 3: last words")
    assert (hangs.verdict, hangs.shape, hangs.what) == ("failed", "B=1 H=2 N=257 D=64", "no answer within 5 s")
    assert [f.broken for f in (sound, dies, hangs)] == [False, True, True]


@pytest.mark.timeout(120)
def test_several_processes_find_what_one_finds_in_its_order(plugin: Path) -> None:
    words = ["check", "failing@raises", "--plugin", plugin, "--device", "cpu", "--json"]
    one, two = call(*words), call(*words, "--concurrent", 2)
    assert one.exit_code == two.exit_code == 1
    assert "12 checks, 2 failed" in one.stderr
    assert two.stderr == "12 checks, 2 failed\n", "no terminal, no progress"
    rows, again = (json.loads(result.stdout) for result in (one, two))

    def told(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("implementation", "shape", "dtype", "mode", "verdict"))

    assert [told(row) for row in rows] == [told(row) for row in again]
    assert [row["what"] for row in again if row["verdict"] == "failed"] == ["RuntimeError: of its own making (failing.py, line 13)"] * 2
    assert all(row["error"] <= row["bound"] for row in again if row["verdict"] == "passed")


@pytest.mark.timeout(120)
def test_a_terminal_shows_progress_and_an_interruption_says_how_many_are_done(plugin: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["check", "failing@hangs", "--plugin", str(plugin), "--device", "cpu", "--concurrent", "2"]
    program = [sys.executable, str(Path(__file__).parent.parent / "cli.py"), *words]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=theirs, text=True, start_new_session=True)
    os.close(theirs)
    stderr = ""
    while " 8/12" not in stderr or len(list(plugin.parent.glob("*.pid"))) < 2:  # the four checks of N = 257 hang
        stderr += os.read(ours, 4096).decode(errors="replace")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    try:
        while part := os.read(ours, 4096):
            stderr += part.decode(errors="replace")
    except OSError:  # how a terminal ends
        os.close(ours)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 130
    assert "failing@hangs N=257 float32, and 1 more" in stderr
    assert stderr.rstrip().endswith("interrupted: 8 of 12 checks done")
    assert "Traceback" not in stderr
    assert [p.stem for p in plugin.parent.glob("*.pid") if Path("/proc", p.stem).exists()] == []


def test_one_process_is_interrupted_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = Check.run, []

    def interrupted(self: Check, device: str) -> Any:
        asked.append(self)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return run(self, device)

    monkeypatch.setattr(Check, "run", interrupted)
    result = call("check", "softmax@math", "--device", "cpu")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted: 3 of 12 checks done\n")


def _masked() -> Callable[[Any], isolate.Reply]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return lambda _: isolate.Reply(signal.SIGINT in mask)


def test_no_interrupt_reaches_a_worker_while_it_imports() -> None:
    worker = isolate.Worker(_masked)
    try:
        assert worker.run("", 60) is True
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        worker.stop()
