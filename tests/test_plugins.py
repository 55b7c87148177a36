"""`--plugin`: what is said where a file cannot be used, and where its method is not asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import synthetic
from cli_support import answer, call, suite_text

from attnbench import registry
from attnbench.case import Case
from attnbench.cell import CellRunner
from attnbench.protocol import Protocol
from attnbench.record import Status

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
from attnbench.method import Citation, Method
from attnbench.methods.topk import METHOD as TOPK
wanted = ("coordinates", "params", "reference", "experts", "cost")
fields = {"name": "strided", "title": "Strides", **{key: getattr(TOPK, key) for key in wanted}}
METHOD = Method(citation=Citation("Nobody", 2026, "Strides of tokens", "https://example.org"), **fields)
"""
"""Top-k attention under another name."""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A registry of each test alone, and its folder."""
    known = registry.registry()
    copy = registry.Registry(dict(known.found), {}, dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    monkeypatch.chdir(tmp_path)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def", "SyntaxError: invalid syntax (strided.py, line 1)"),
        ("x = 1\ny = x.z", "AttributeError: 'int' object has no attribute 'z' (line 2)"),
        ("raise SystemExit", "SystemExit: no message (line 1)"),
        ("x = 1", "it exports no METHOD of type attnbench.method.Method"),
        (changed('"name": "strided"', '"name": "other"'), "METHOD.name is 'other', but its file or entry point is named 'strided'"),
        (changed(', "cost"', ""), "METHOD lacks cost: give Method(cost=...)"),
        (changed('"reference", "experts", "cost"', ""), "METHOD lacks reference, cost: give Method(reference=..., cost=...)"),
        (changed("**fields", "**fields, exakt=True"), "unknown field 'exakt' in METHOD: did you mean exact"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "strided.py").write_text(text)
    result = call("show", "softmax", "--plugin", "strided.py")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith(f"error: strided.py: {why}")


@pytest.mark.parametrize("words", ["check softmax", "plan quick", "run quick", "taxonomy"])
def test_every_command_refuses_a_folder_with_a_broken_plugin(words: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "strided.py").write_text(GOOD)
    (tmp_path / "mine" / "broken.py").write_text("def")
    result = call(*words.split(), "--plugin", "mine")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith("error: mine/broken.py: SyntaxError")
    assert "strided" in call("list", "--plugin", "mine").stdout


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Records of a built-in method and of another."""
    records = [synthetic.ok(synthetic.case(name, n=n), 1e-6 * n) for name in ("softmax", "strided") for n in (256, 512, 1024)]
    synthetic.write(tmp_path / "results", "quick", records)
    (tmp_path / "strided.py").write_text(GOOD)
    return tmp_path / "results"


NOTE = "strided is no built-in method: give its file with --plugin, for its title, family and source"


@pytest.mark.parametrize(
    "words",
    ["report results", "crossover results --against softmax", "compare softmax strided --results results", "compare results results"],
)
def test_records_of_an_unknown_method_are_told_once(words: str, results: Path) -> None:
    without = call(*words.split())
    assert (without.exit_code, without.stderr.count(NOTE)) == (0, 1), without.output
    assert NOTE not in call(*words.split(), "--plugin", "strided.py").stderr


def test_a_plugin_gives_its_records_title_family_and_source(results: Path) -> None:
    """In a paper, whose command in the provenance names the plugin too."""
    assert "| strided | unknown |" in call("report", "results").stdout
    assert "| Strides | per-query routing |" in call("report", "results", "--plugin", "strided.py").stdout
    done = call("paper", "results", "--out", "paper", "--plugin", "strided.py")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    folder = results.parent / "paper"
    assert "nobody2026strides" in (folder / "references.bib").read_text()
    assert "--plugin strided.py" in (folder / "provenance.json").read_text()


def test_plots_know_the_family_of_a_plugin(results: Path) -> None:
    """Whose colour a line has."""
    assert NOTE in call("plot", "results", "--out", "a").stderr
    assert call("plot", "results", "--out", "b", "--plugin", "strided.py").stderr == ""
    drawn = {folder: "".join(p.read_text() for p in sorted((results.parent / folder).glob("*latency*.csv"))) for folder in "ab"}
    assert "per-query routing" not in drawn["a"]
    assert "per-query routing" in drawn["b"]


SUITE = suite_text('[[method]]\nname = "linear"', 16)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_plugin_of_which_a_suite_has_no_cell_is_told(command: str, tmp_path: Path) -> None:
    """Once, and not where `--method` or the suite says what is meant."""
    (tmp_path / "strided.py").write_text(GOOD)
    (tmp_path / "mine.toml").write_text(SUITE)
    words = ["mine.toml", "--plugin", "strided.py"]
    told = "strided is loaded, but suite mine has no cell of it: add --method strided\n"
    result = call(command, *words, *(("--device", "cpu", "--untimed") if command == "run" else ()))
    assert (result.exit_code, result.stderr.count(told)) == (0, 1), result.output
    assert "is loaded" not in call("plan", *words, "--method", "linear").stderr
    (tmp_path / "mine.toml").write_text(SUITE.replace("linear", "strided"))
    assert "is loaded" not in call("plan", *words).stderr


@pytest.mark.parametrize(
    ("target", "requires", "status"),
    [
        ("nomod.x:fast", "", "error"),
        ("attnbench.eager:fast", "", "error"),
        ("nomod.x:fast", "nomod", "ok"),
        ("fragile:fast", "fragile", "ok"),
        ("fragile:fast", "", "error"),
        ("mine_needs_fragile:fast", "fragile", "ok"),
        ("mine_misuses_torch:fast", "torch", "error"),
    ],
)
def test_a_broken_implementation_is_no_absent_package(
    target: str, requires: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An absent or broken package of `requires` leaves the eager form; any other failure of an import is the implementation's own."""
    modules = {
        "fragile": "raise OSError('no such library')",
        "mine_needs_fragile": "import fragile",
        "mine_misuses_torch": "import torch\ntorch.zeros(-1)",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    extra = f"implementations=(Implementation('fast', {target!r}, requires={(requires,) if requires else ()}),)"
    text = changed("import Citation", "import Citation, Implementation").replace("**fields", f"**fields, {extra}")
    (tmp_path / "strided.py").write_text(text)
    found = call("check", "strided@fast", "--plugin", "strided.py", "--device", "cpu", "--json")
    assert found.exit_code == (1 if status == "error" else 0), found.output
    verdicts = {row["verdict"] for row in json.loads(found.stdout) if row["implementation"] == "strided@fast"}
    assert verdicts == {"failed" if status == "error" else "unsupported"}
    case = Case(task="speed", method="strided", params=(("causal", False), ("topk", 4)), heads=1, n=16, dim=8)
    record = CellRunner("cpu", Protocol(timed=False)).attempt(case)
    assert record.status is Status(status), record.reasons
    assert record.implementation == ("eager" if status == "ok" else "")
    assert status == "ok" or record.reasons[0].startswith("strided@fast cannot be imported: ")


def test_new_writes_a_method_that_passes_every_check() -> None:
    """And says what to run next."""
    made = call("new", "my_method")
    assert (made.exit_code, made.stdout) == (0, "my_method.py\n"), made.output
    plugin = ("--plugin", "my_method.py")
    assert f"attnbench check {' '.join(plugin)} my_method\n" in made.stderr
    assert f"attnbench run quick {' '.join(plugin)} --method my_method --method softmax --results mine\n" in made.stderr
    found = answer("check", "my_method", *plugin, "--device", "cpu", "--json")
    assert {row["verdict"] for row in found} == {"passed"}
    assert {"my_method@eager", "my_method@split"} <= {row["implementation"] for row in found}
    measured = answer("taxonomy", "--verify", "--scaling", "routing", "--count", "m", "--format", "json", *plugin)
    assert [(row["method"], row["verdict"]) for row in measured] == [("my_method", "agrees")] * 5
    facts = answer("show", "my_method", *plugin, "--json")
    assert (facts["title"], facts["budget"]) == ("My method", ["stride"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("3rd", "'3rd' is no name of a method"),
        ("class", "'class' is no name of a method"),
        ("_mine", "'_mine' is no name of a method"),
        ("softmax", "there is a method 'softmax' already"),
        ("mine --out yours.py", "the file is named as its method: give a path that ends in mine.py"),
        ("mine --out absent/mine.py", "cannot write absent/mine.py: No such file or directory; give a folder that exists"),
        ("held", "held.py exists"),
    ],
)
def test_new_refuses_what_would_not_be_found_or_is_there(words: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text("mine")
    result = call("new", *words.split())
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert why in result.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("held.py", "mine")]
