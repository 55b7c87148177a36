"""The command line: what goes where, exit codes, and one line for each mistake."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_support import answer, call

import attnbench
from attnbench import store
from attnbench.case import Case
from attnbench.cli import app
from attnbench.cli._output import comma_separated, latex, markdown, si
from attnbench.errors import UserError
from attnbench.plan import Ceilings, predict
from attnbench.record import Memory, Record, Status, Timing

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


def test_list_filters_and_says_what_runs_here() -> None:
    found = answer("list", "s*", "--json", "--device", "cpu")
    assert [m["name"] for m in found["methods"]] == ["sliding_window", "softmax", "spark"]
    state = {i["name"]: i for i in found["methods"][1]["implementations"]}
    assert state["eager"]["available"]
    assert state["cudnn"] == {**state["cudnn"], "available": False, "reasons": ["runs on cuda only"]}
    text = call("list", "softmax", "--device", "cpu").stdout
    assert "runs on cuda only" in text
    assert "mita" not in text


def test_list_shows_what_failed_to_load_beside_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench import registry

    known = registry.registry()
    copy = registry.Registry(dict(known.found), {}, dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    (tmp_path / "broken.py").write_text("raise RuntimeError('of its own making')")
    result = call("list", "--plugin", tmp_path / "broken.py")
    assert result.exit_code == 0
    (line,) = (line for line in result.stdout.splitlines() if "broken" in line)
    assert "softmax" in result.stdout
    assert f"failed to load from {tmp_path / 'broken.py'}: RuntimeError: of its own making (line 1)" in line
    assert result.stderr == "failed to load: broken; -v shows the traceback\n"
    assert "Traceback" in call("list", "--plugin", tmp_path / "broken.py", "-v").stderr


def test_show_counts_the_cost_that_the_formula_gives() -> None:
    facts = answer("show", "softmax", "--n", 100, "--heads", 3, "--dim", 8, "--json")
    assert facts["cost"]["forward_flops"] == 4 * 3 * 100 * 100 * 8
    assert facts["coordinates"]["topology"] == "all-to-one"
    text = call("show", "mita").stdout
    for word in ("MiTA", "Wen et al.", "landmark probing", "keys of one expert", "arxiv.org/abs/2602.01219"):
        assert word in text
    assert answer("show", "topk", "--set", "topk=7", "--json")["cost"]["params"]["topk"] == 7


def test_the_taxonomy_is_the_same_table_in_every_format() -> None:
    rows = answer("taxonomy", "--format", "json")
    assert {r["name"] for r in rows} == set(attnbench.methods())
    table = call("taxonomy", "--format", "csv").stdout
    assert list(csv.DictReader(io.StringIO(table))) == rows
    lines = call("taxonomy", "--format", "markdown").stdout.splitlines()
    assert [[c.strip() for c in line.strip("|").split("|")] for line in lines[2:]] == [list(r.values()) for r in rows]
    tex = call("taxonomy", "--format", "latex").stdout
    assert tex.count(r"\\") == len(rows) + 1
    assert r"compression \& routing" in tex
    assert all(row["name"] in call("taxonomy").stdout for row in rows)


def test_the_taxonomy_filters_by_any_dimension() -> None:
    def names(*words: str) -> set[str]:
        return {r["name"] for r in answer("taxonomy", "--format", "json", *words)}

    per_query, blocks = {"topk", "spark", "dsa", "sliding_window", "deformable"}, {"moba", "bra", "block_window"}
    assert names("--scaling", "routing") == per_query | blocks | {"dat"}
    assert names("--scaling", "routing", "--construction", "locality prior") == blocks | {"sliding_window"}
    assert names("--scaling", "both") == {"mita", "nsa"}
    assert names("--expert", "module") == {"ttt", "vit3"}
    assert names("--count", "N/n") == blocks | {"nsa"}
    assert names("--topology", "N-to-m") == {"mita"}


def test_verify_exits_with_1_on_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench import registry
    from attnbench.taxonomy import Count

    assert call("taxonomy", "--verify", "--scaling", "routing").exit_code == 0
    honest = attnbench.get("moba")
    liar = replace(honest, coordinates=replace(honest.coordinates, count=Count.TOKENS))
    monkeypatch.setitem(registry.registry().found, "moba", liar)
    result = call("taxonomy", "--verify", "--scaling", "routing", "--format", "json")
    assert result.exit_code == 1
    assert [(r["method"], r["dimension"]) for r in json.loads(result.stdout) if r["verdict"] == "conflict"] == [("moba", "count")]
    assert "1 declared coordinates conflict" in result.stderr


def test_check_reports_every_implementation_and_fails_on_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench import registry

    rows = answer("check", "softmax@math", "--device", "cpu", "--json")
    assert {r["verdict"] for r in rows} == {"passed"}
    assert all(r["error"] <= r["bound"] for r in rows)
    wrong = replace(attnbench.get("softmax"), implementations=(replace(attnbench.get("linear").implementation("chunked"), name="wrong"),))
    monkeypatch.setitem(registry.registry().found, "softmax", wrong)
    result = call("check", "softmax@wrong", "--device", "cpu", "--json")
    assert result.exit_code == 1
    assert "failed" in {r["verdict"] for r in json.loads(result.stdout)}


def test_suites_and_env() -> None:
    assert {"quick", "speed", "vision", "fidelity", "graph"} <= {row["suite"] for row in answer("suites", "--json")}
    assert "From which length" in call("suites").stdout
    facts = answer("env", "--device", "cpu", "--json")
    assert facts["device_type"] == "cpu"
    assert facts["packages"]["torch"]
    assert set(facts["missing"]).isdisjoint(facts["packages"])
    assert "python" in call("env").stdout


def test_plan_predicts_by_the_roofline() -> None:
    words = [
        "quick",
        "--method",
        "softmax@eager",
        "--axis",
        "n=64,128",
        "--axis",
        "mode=forward",
        "--flops",
        "1",
        "--bandwidth",
        "0.001",
        "--json",
    ]
    found = answer("plan", *words, "--flops", 1, "--bandwidth", 0.001)
    assert found["total"]["cells"] == 4, "two lengths, each measured again for the noise floor"
    cell = next(c for c in found["cells"] if c["n"] == 128)
    heads, dim = 4, 32
    assert cell["flops"] == 4 * heads * 128 * 128 * dim
    assert cell["bytes"] == cell["least_bytes"] == 4 * heads * 128 * dim * 4
    assert cell["floor_s"] == max(cell["flops"] / 1e12, cell["bytes"] / 1e9) == cell["bytes"] / 1e9
    assert found["total"]["flops"] == sum(c["flops"] for c in found["cells"])
    text = call("plan", "quick").stdout
    assert "H100" in text
    assert "mita" in text


def test_a_backward_pass_costs_more_of_everything() -> None:
    forward, both = (predict(Case(task="speed", method="softmax", mode=mode)) for mode in ("forward", "forward+backward"))
    assert both.flops == 3.5 * forward.flops
    assert both.least_bytes == 2 * forward.least_bytes
    assert both.floor_s > forward.floor_s
    slow = predict(forward.case, Ceilings("slow", 1e3, {"float32": 1e30}))
    assert slow.floor_s == forward.bytes / 1e3
    with pytest.raises(UserError, match="above 0"):
        Ceilings("broken", -1)


def stored(folder: Path) -> Path:
    """Records of two lengths: one measured twice over, one out of memory."""
    timing, memory = Timing((0.001, 0.002, 0.003), 1.0, "cpu"), Memory(2**21, 0, 0, 0, 0, "counted")
    case = Case(task="speed", method="softmax", params=(("causal", False),), n=1000)
    with store.Store(folder / "mine" / "device") as target:
        target.save_environment("e", {"device": "A CPU"})
        target.append(Record(case, Status.OK, "e", "math", timing=timing, memory=memory))
        target.append(Record(replace(case, n=2000), Status.OOM, "e", "math"))
    return folder


def test_report_shows_medians_and_failures_in_their_place(tmp_path: Path) -> None:
    text = call("report", stored(tmp_path)).stdout
    (row,) = (line for line in text.splitlines() if line.startswith("| Softmax"))
    assert [cell.strip().split(" ")[0] for cell in row.strip("|").split("|")][2:4] == ["2.00", "oom"]
    assert "A CPU" in text
    assert "N=2000" not in call("report", tmp_path, "--lengths", "1000").stdout
    out = tmp_path / "report.tex"
    assert call("report", tmp_path, "--format", "latex", "--out", out).stdout.strip() == str(out)
    assert r"\toprule" in out.read_text()
    result = call("report", tmp_path, "--out", tmp_path / "absent" / "report.md")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    for words, code in ((["--lengths", "5"], 2), (["--lengths", "5,1000"], 0)):
        told = call("report", tmp_path, *words)
        assert (told.exit_code, told.stderr.count("\n")) == (code, 1)
        assert f"--lengths {words[1]}: these results have no N = 5, but 1000, 2000" in told.stderr
    assert "--lengths x: give whole numbers" in call("report", tmp_path, "--lengths", "x").stderr


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").touch()
    result = call("report", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{tmp_path} holds no record that a table shows: run a suite first" in result.stderr


def test_plot_prints_the_paths_of_what_it_drew(tmp_path: Path) -> None:
    paths = [Path(line) for line in call("plot", stored(tmp_path)).stdout.splitlines()]
    assert {".pdf", ".png", ".csv"} == {p.suffix for p in paths}
    assert all(p.exists() and p.parent == tmp_path / "figures" for p in paths)


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


def test_tables_escape_what_their_format_reserves() -> None:
    rows = [{"a": "x|y", "c_d": "50%"}]
    assert markdown(rows).splitlines()[2] == r"| x\|y | 50% |"
    assert r"50\%" in latex(rows)
    assert r"c\_d" in latex(rows)
    assert comma_separated([{"a": 'say "x, y"'}]) == 'a\n"say ""x, y"""'
    assert markdown([]) == latex([]) == comma_separated([]) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e12, "2.5 TB"), (3e-3, "3 mB"), (4e-9, "4 nB")]
)
def test_prefixes(value: float, text: str) -> None:
    assert si(value, "B") == text
