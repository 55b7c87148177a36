"""What each command answers: its tables, its numbers and its exit code."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_support import answer, call

import attnbench
from attnbench import store
from attnbench.case import Case
from attnbench.cli._output import comma_separated, latex, markdown, si
from attnbench.errors import UserError
from attnbench.plan import Ceilings, predict
from attnbench.record import Memory, Record, Status, Timing


def test_list_filters_and_says_what_runs_here() -> None:
    found = answer("list", "s*", "--json", "--device", "cpu")
    assert [m["name"] for m in found["methods"]] == ["sliding_window", "softmax", "spark"]
    state = {i["name"]: i for i in found["methods"][1]["implementations"]}
    assert state["eager"]["available"]
    assert state["cudnn"] == {**state["cudnn"], "available": False, "reasons": ["runs on cuda only"]}
    text = call("list", "softmax", "--device", "cpu").stdout
    assert "runs on cuda only" in text
    assert "mita" not in text
    none = call("list", "sofmax*", "--json")
    assert (none.exit_code, none.stdout) == (2, "")
    assert none.stderr == "error: unknown method 'sofmax*': did you mean softmax?\n"


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
