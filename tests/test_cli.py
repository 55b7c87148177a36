"""The command line: its flags and its help, exit codes, and one line for each mistake."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import typer
from cli_support import call

import attnbench
from attnbench.cli import app

if TYPE_CHECKING:
    from pathlib import Path

FLAGS = {
    "": {"--version", "--install-completion", "--show-completion", "--help", "-h"},
    "capture": {"--out", "--data", "--n", "--batch", "--device", "--json"},
    "check": {"--all", "--concurrent", "--device", "--json", "--plugin"},
    "compare": {"--results", "--drift", "--json", "--plugin"},
    "crossover": {"--against", "--metric", "--mode", "--json", "--plugin"},
    "env": {"--device", "--json"},
    "list": {"--device", "--verbose", "-v", "--json", "--plugin"},
    "merge": {"--into"},
    "new": {"--out"},
    "paper": {"--out", "--lengths", "--suite", "--method", "--device", "--plugin"},
    "plan": {"--method", "--axis", "--set", "--budget", "--data", "--flops", "--bandwidth", "--json", "--plugin"},
    "plot": {"--out", "--examples", "--kept", "--data", "--figure", "--suite", "--method", "--device", "--plugin"},
    "report": {"--format", "--lengths", "--out", "--html", "--suite", "--method", "--device", "--plugin"},
    "run": {
        *("--results", "--device", "--method", "--axis", "--set", "--budget", "--resume", "--no-resume", "--retry", "--timeout"),
        *("--budget-s", "--untimed", "--breakdown", "--energy", "--quiet", "-q", "--json", "--plugin", "--shard", "--executor"),
        *("--address", "--concurrent", "--data"),
    },
    "show": {"--n", "--batch", "--heads", "--dim", "--set", "--device", "--json", "--plugin"},
    "suites": {"--json"},
    "taxonomy": {
        "--across",
        "--colour",
        "--construction",
        "--costs",
        "--count",
        "--down",
        "--expert",
        "--figure",
        "--format",
        "--n",
        "--plugin",
        "--results",
        "--scaling",
        "--size",
        "--topology",
        "--verify",
    },
}


def test_the_flags_are_frozen() -> None:
    group: Any = typer.main.get_command(app)
    found = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")} for name, c in group.commands.items()}
    context = group.make_context("attnbench", ["list"])
    found[""] = {o for p in group.get_params(context) for o in p.opts}
    assert found == FLAGS


@pytest.mark.parametrize("command", [c for c in FLAGS if c])
def test_every_command_explains_itself_and_its_options(command: str) -> None:
    group: Any = typer.main.get_command(app)
    assert call(command, "--help").exit_code == 0
    assert group.commands[command].help
    assert [
        p.name for p in group.commands[command].params if not getattr(p, "help", None) and p.name not in ("batch", "heads", "format_")
    ] == []


def test_without_a_command_the_help_is_shown() -> None:
    assert "taxonomy" in call().output
    assert call("--version").stdout.strip() == attnbench.__version__


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("show mitaa", "unknown method 'mitaa': did you mean mita?"),
        ("show mita --set topk=big", "mita.topk = 'big' is not of type int"),
        ("show mita --set topk=4097", "topk = 4097 exceeds"),
        ("show mita --set topk", "there is no '='"),
        ("show softmax --heads 0", "heads = 0 is not a size"),
        ("check nothing", "unknown method 'nothing'"),
        ("check", "name a method, or give --all"),
        ("check softmax --concurrent 0", "--concurrent 0: no check would run: give at least 1"),
        ("taxonomy --scaling routes", "unknown scaling 'routes': choose from"),
        ("plan sped", "unknown suite 'sped': did you mean speed?"),
        ("plan quick --axis n", "--axis n: there is no '='"),
        ("plan quick --axis m=5", "unknown axis 'm'"),
        ("plan quick --axis direction=backward", "unknown axis 'direction' in suite quick: choose from batch, budget, causal"),
        ("plan quick --axis n=many", "many"),
        ("plan quick --axis steps=7", "suite quick trains no model: leave out --axis steps, or run accuracy, swap_in or pruning"),
        ("plan quick --axis dtype=fp8", "unknown value of dtype 'fp8'"),
        ("plan quick --axis profile=rnd", "unknown profile 'rnd'"),
        ("plan quick --set mita=5", "names no method and parameter"),
        ("plan quick --set mita.top=5", "unknown parameter 'top' in mita"),
        ("plan quick --set mta.topk=5", "unknown method 'mta'"),
        ("plan quick --axis n=16", "exceeds"),
        ("plan quick --method nosuch", "unknown method 'nosuch'"),
        ("plan quick --flops 0", "above 0"),
        ("plan quick --budget 64", "--budget 64: there is no '='"),
        ("plan quick --budget keys=abc", "'abc' is no whole number of at least 1: write it as keys=64"),
        ("plan quick --budget keys=64,0", "'0' is no whole number"),
        ("plan quick --budget heads=4", "'heads' is not what a budget counts"),
        ("plan quick --budget keys=256", "budget = 256 exceeds N = 128: lower the budget, or raise N"),
        ("run quick --budget keys=64 --method linear --method softmax", "no budget sets what linear, softmax read: leave the budget out"),
        ("run sped", "unknown suite 'sped'"),
        ("run quick --axis profile=file:absent.safetensors", "cannot read absent.safetensors: No such file or directory"),
        ("run quick --axis profile=file", "profile file needs a path: write file:PATH.safetensors"),
        ("run quick --budget-s 0", "budget_s = 0.0 must be above 0"),
        ("run quick --shard 9/3", "--shard 9/3: write it as I/N with I from 1 to N"),
        ("run quick --address here:1", "--address is of a Ray cluster: add --executor ray"),
        ("report absent --html page.html", "absent does not exist: run a suite first"),
        ("run quick --plugin absent.py", "plugin absent.py does not exist"),
        ("list --plugin absent.py", "plugin absent.py does not exist"),
        ("plot absent", "absent does not exist: run a suite first"),
        ("report absent", "absent does not exist: run a suite first"),
        ("compare a b --results absent", "absent does not exist"),
        ("crossover absent", "absent does not exist: run a suite first"),
        ("merge absent --into elsewhere", "absent does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, culprit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*words.split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert culprit in result.stderr
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU, so demanding one is no mistake")
@pytest.mark.parametrize("command", ["run quick", "env", "list", "check softmax"])
def test_a_gpu_that_is_demanded_and_absent_is_a_mistake(command: str) -> None:
    result = call(*command.split(), "--device", "cuda")
    assert result.exit_code == 2
    assert "device cuda was asked for" in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("attnbench.environment.pick_device", broken)
    assert isinstance(call("env").exception, RuntimeError)


def test_completion_knows_methods_and_suites() -> None:
    from attnbench.cli._options import complete_figure, complete_method, complete_suite

    assert complete_figure("la") == ["latency"]
    assert complete_method("mo") == ["moba"]
    assert complete_method("m") == ["mhla", "mita", "moba"]
    assert complete_suite("s") == ["speed", "swap_in"]


def test_the_help_names_every_axis() -> None:
    from attnbench.axes import AXES
    from attnbench.cli._options import AXIS_NAMES

    assert sorted(re.findall(r"\w+", AXIS_NAMES.replace("of suites that train", ""))) == sorted(AXES)
    assert "short_conv" in call("run", "--help").stdout
