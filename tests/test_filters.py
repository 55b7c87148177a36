"""Which records plot, report and paper are about, and how each figure is written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import synthetic
from cli_support import call

from attnbench import figures, frame
from attnbench.figures import latency


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two suites on two devices."""
    folder = tmp_path_factory.mktemp("results")
    for suite, device in (("speed", "Card A"), ("vision", "Card B")):
        cells = [synthetic.case(label, n=n) for label in ("softmax@flash", "linear") for n in (1024, 2048)]
        synthetic.write(folder, suite, [synthetic.ok(c, 1e-3) for c in cells], {"device": device})
    return folder


def _left(results: Path, **asked: list[str]) -> set[tuple[str, str]]:
    table = frame.only(frame.load(results)[0], **asked)
    return set(zip(table["suite"], table["label"], strict=True))


def test_a_filter_leaves_what_it_names(results: Path) -> None:
    assert _left(results, suites=["speed"]) == {("speed", "softmax@flash"), ("speed", "linear")}
    assert _left(results, methods=["softmax@flash"]) == {("speed", "softmax@flash"), ("vision", "softmax@flash")}
    assert _left(results, devices=["Card B"], methods=["linear"]) == {("vision", "linear")}
    assert _left(results, devices=["card-b"]) == _left(results, suites=["vision"])
    assert _left(results, suites=["speed", "vision"]) == _left(results)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suite sped", "--suite sped: these results have speed, vision"),
        ("--method moba", "--method moba: these results have linear, softmax"),
        ("--method softmax@triton", "--method softmax@triton: these results have softmax@"),
        ("--device H100", "--device H100: these results have Card A, Card B"),
        ("--suite speed --device card-b", "the first of them leaves speed on Card A"),
    ],
)
@pytest.mark.parametrize("command", ["plot", "report", "paper"])
def test_a_filter_that_leaves_nothing_says_what_there_is(command: str, words: str, message: str, results: Path, tmp_path: Path) -> None:
    answer = call(command, results, "--out", tmp_path / "out", *words.split())
    assert answer.exit_code == 2
    assert message in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_only_the_figures_named_are_drawn(results: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path, "--suite", "speed", "--figure", "latency")
    made = [Path(line).name for line in call("plot", results, *words).stdout.splitlines()]
    assert made == [f"speed-latency-card-a{suffix}" for suffix in (".pdf", ".png", ".csv")]
    unknown = call("plot", results, "--figure", "late", "--out", tmp_path)
    assert unknown.exit_code == 2
    assert "there is no figure 'late': they are accuracy, " in unknown.stderr
    assert "no recall to draw" in call("plot", results, "--figure", "recall", "--out", tmp_path).stderr


def test_a_paper_of_some_results_says_how_it_is_made_again(results: Path, tmp_path: Path) -> None:
    call("paper", results, "--out", tmp_path, "--suite", "vision", "--device", "Card B")
    remake = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))["remake"]
    assert shlex.split(remake)[-4:] == ["--suite", "vision", "--device", "Card B"]
    assert "speed" not in (tmp_path / "main.tex").read_text(encoding="utf-8")


def test_a_figure_is_laid_out_once_for_all_formats(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = latency.build(next(figures.series.groups(frame.load(results)[0])).rows)
    assert figure is not None
    engine = figure.get_layout_engine()
    assert engine is not None
    calls, execute = [], engine.execute
    monkeypatch.setattr(engine, "execute", lambda of: (calls.append(of), execute(of)))
    figures.write(figure, frame.load(results)[0], tmp_path / "x")
    assert len(calls) == 1
    assert figure.get_layout_engine() is engine
