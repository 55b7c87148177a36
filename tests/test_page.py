"""The report as one page: whole without network, true to its records, and alive in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from threading import Timer
from typing import TYPE_CHECKING, Any

import pytest
import synthetic
import synthetic_trained
from cli_support import call
from page_support import Page, unpacked

from attnbench import frame, series, store, suite_file
from attnbench.page import joined
from attnbench.page.summary import sentences
from attnbench.record import Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

LENGTHS = [1024, 16384, 262144]
CHROME = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)


def table(tmp_path: Path, *parts: Sequence[Any]) -> pd.DataFrame:
    for i, records in enumerate(parts):
        synthetic.write(tmp_path, ("speed", "fidelity")[i], records)
    return frame.load(tmp_path)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    table(folder, synthetic.speed(LENGTHS), synthetic.fidelity([1024]))
    return folder


@pytest.fixture(scope="module")
def file(results: Path) -> Path:
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    path = results.parent / "page.html"
    result = call("report", results, "--html", path)
    assert (result.exit_code, result.stdout.strip(), result.stderr) == (0, str(path), "")
    return path


def test_the_page_is_html_that_asks_for_nothing(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [], "every element is closed"
    assert [f for f in page.fetched if not f.startswith("data:")] == []
    for style in page.data["style"]:
        assert "@import" not in style
        assert "url(" not in style
    assert "default-src 'none'" in text
    assert "connect-src" not in text
    assert len(text) < 5_000_000


def test_the_section_that_the_summary_speaks_of_is_first_and_open(tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    for suite, lengths in (("graph", (1024,)), ("speed", (1024, 2048))):
        synthetic.write(tmp_path, suite, [synthetic.ok(synthetic.case(m, n=n), 1e-3) for m in ("softmax@flash", "linear") for n in lengths])
    assert call("report", tmp_path, "--html", tmp_path / "page.html").exit_code == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    heads = re.findall(r"<details( open)?><summary>(graph|speed): ", text)
    assert heads == [(" open", "speed"), ("", "graph")]
    assert "(speed, forward" in text.partition("</section>")[0]


def test_the_page_has_every_cell_with_its_status_and_every_plot_of_every_method(file: Path, results: Path) -> None:
    page, rows = Page(file.read_text(encoding="utf-8")), frame.current(frame.load(results)[0])
    key = ["method", "suite", "mode", "status"]
    assert sorted(tuple(row[f"data-{k}"] for k in key) for row in page.rows) == sorted(rows[key].itertuples(index=False, name=None))
    items = [json.loads(unpacked(text)) for text in page.data["script"] if text.startswith("eN")][:-1]
    sources = [column for item in items for column in re.findall(r'\["method",(\[.*?\])\]', json.dumps(item, separators=(",", ":")))]
    drawn = {name for names in sources for name in json.loads(names)}
    assert drawn >= set(rows.loc[rows["status"] == "ok", "method"])
    assert {"latency, forward", "memory, forward+backward", "fidelity, needle, N=1024", "pareto, randn, N=1024"} <= set(
        page.data["figcaption"]
    )
    assert json.loads(next(t for t in page.data["script"] if '"family"' in t))["mita"]["topology"] == "N-to-m"


def test_the_summary_says_what_the_records_say(results: Path) -> None:
    extent, fastest, overtaking, least, accuracy = sentences(frame.load(results)[0])
    assert "10 methods were tried in 2 suites (fidelity, speed) on Test GPU 80GB" in extent
    assert re.search(r"Fastest at N=262144 \(speed, forward, .*\) is Linear with 10\.\d ms", fastest)
    assert "times as fast as the best exact method, FlashAttention" in fastest
    assert "from N=16384" in overtaking
    assert "needs least memory there" in least
    assert "Of 12 inexact configurations, Top-k, topk=64 stays closest to softmax attention at N=1024" in accuracy


@pytest.mark.parametrize("count", [1, 2])
def test_five_sentences_also_of_little(tmp_path: Path, count: int) -> None:
    cells = [synthetic.case("softmax", n=1024), synthetic.case("mita", n=1024)]
    records = [synthetic.ok(cells[0], 1e-3) if count == 2 else synthetic.failed(cells[0], "oom"), synthetic.failed(cells[1], "error")]
    said = sentences(table(tmp_path, records))
    assert len(said) == 5
    assert ("No speed was measured." in said) == (count == 1)
    assert said[-1] == "No distance from softmax attention was measured."


def test_the_summary_averages_over_tasks_that_all_learned_alone(tmp_path: Path) -> None:
    value = {"softmax": {"mqar": 0.9, "digits": 0.8}, "linear": {"mqar": 0.3, "digits": 0.9}, "topk": {"mqar": 0.95, "digits": 0.97}}
    planned = suite_file.load("accuracy").override({"data": ["mqar", "digits"], "n": ["256", "1024"], "seed": ["0"]}, list(value), {})
    cases = [c for c in planned.expand() if (c.data, c.n) in (("mqar", 256), ("digits", 1024))]
    records = [synthetic_trained.trained(c, value[c.method][c.data]) for c in cases]
    failed = next(i for i, r in enumerate(records) if r.case.method == "linear" and dict(r.case.params)["causal"])
    records[failed] = replace(records[failed], status=Status.DIVERGED, training=None, metrics={})
    synthetic.write(tmp_path, "accuracy", records)
    said = sentences(frame.load(tmp_path)[0])[5:]
    assert said == [
        "Of 3 configurations trained on 2 tasks (accuracy, Test GPU 80GB: digits, N=1024; mqar, N=256) Top-k is the most accurate on "
        "average, 0.960, Softmax at 0.850, and Linear the least, 0.600."
    ], "recall with a mask, where one failed, is left out"
    alone = [r for r in records if r.case.method == "softmax"]
    assert len(sentences(frame.load(synthetic.write(tmp_path / "one", "accuracy", alone))[0])) == 5, "one is compared with none"


def test_the_table_joins_speed_with_fidelity_and_compares_within_conditions(tmp_path: Path) -> None:
    params = {"landmarks": 64, "topk": 64}
    cells = [
        synthetic.ok(synthetic.case("softmax", n=1024), 4e-3, spread=0),
        synthetic.ok(synthetic.case("mita", params, n=1024), 1e-3, spread=0),
        synthetic.ok(synthetic.case("mita", params, n=1024, batch=2), 1e-3, spread=0),
        synthetic.failed(synthetic.case("mita", params, n=2048), "oom"),
    ]
    distance = [
        synthetic.ok(synthetic.case("mita", params, n=n, task="fidelity"), 1e-3, metrics={"rel_error": n / 1e4}) for n in (512, 1024)
    ]
    found = {(r["suite"], r["method"], r["batch"], r["n"]): r for r in joined.rows(table(tmp_path, cells, distance))}
    assert found["speed", "mita", 1, 1024]["speed_up"] == pytest.approx(4)
    assert found["speed", "mita", 2, 1024]["speed_up"] is None, "no exact method ran under these conditions"
    assert (found["speed", "mita", 1, 2048]["speed_up"], found["speed", "mita", 1, 2048]["status"]) == (None, "oom")
    assert (found["speed", "mita", 1, 2048]["error"], found["speed", "mita", 1, 2048]["error_n"]) == (0.1024, 1024)
    assert found["fidelity", "mita", 1, 512]["error"] == 0.0512
    assert found["speed", "softmax", 1, 1024]["error"] is None


@pytest.mark.parametrize("content", ["nothing", "empty", "mixed"])
def test_a_folder_without_records_of_one_schema_is_one_clear_line(tmp_path: Path, content: str) -> None:
    if content != "nothing":
        synthetic.write(tmp_path, "speed", [synthetic.ok(synthetic.case("softmax"), 1e-3)])
        (records,) = store.find(tmp_path)
        line = records.read_text()
        records.write_text("" if content == "empty" else line + line.replace('"schema":1', '"schema":2'))
    result = call("report", tmp_path, "--html", tmp_path / "page.html")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    expected = {"nothing": "holds no records.jsonl", "empty": "holds no record yet", "mixed": "line 2: record has schema 2"}
    assert expected[content] in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_other_forms_and_a_missing_bokeh_are_one_clear_line(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("report", results, "--html", tmp_path / "page.html", "--format", "latex")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    monkeypatch.setitem(__import__("sys").modules, "bokeh", None)
    result = call("report", results, "--html", tmp_path / "page.html")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install 'attnbench[report]'" in result.stderr


PROBE = """<script>setTimeout(() => {
  const form = document.getElementById("filters"), said = [], say = (name, text) => said.push(name + "=" + text);
  const shown = () => [...document.querySelectorAll("#cells tbody tr:not([hidden])")];
  say("all", shown().length);
  say("plots", document.querySelectorAll(".plot > *").length);
  say("overflow", document.documentElement.scrollWidth - document.documentElement.clientWidth);
  form.elements.topology.value = "N-to-m"; form.dispatchEvent(new Event("input"));
  say("methods", [...new Set(shown().map((r) => r.dataset.method))].join());
  form.reset();
  const i = [...document.querySelectorAll("#cells th")].findIndex((h) => h.textContent === "time (ms)");
  document.querySelectorAll("#cells th button")[i].click();
  const column = [...document.querySelectorAll("#cells tbody tr")].map((r) => r.cells[i].dataset.v ?? r.cells[i].textContent);
  const times = column.map(Number).filter((v) => !Number.isNaN(v));
  say("sorted", times.length > 9 && times.every((t, i) => !i || times[i - 1] <= t));
  console.log("PROBE " + said.join(" ") + " END");
}, 3000)</script></body>"""


def console(page: Path, profile: Path, size: str) -> list[str]:
    """What a page writes to the console of a browser until the probe has spoken."""
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}"]
    said = []
    with subprocess.Popen(
        [str(CHROME), *words, f"--user-data-dir={profile}", "--remote-debugging-port=0", page.as_uri()], stderr=subprocess.PIPE, text=True
    ) as browser:
        assert browser.stderr is not None
        watch = Timer(60, browser.kill)
        watch.start()
        for line in browser.stderr:
            said += [line] if "CONSOLE" in line else []
            if "PROBE" in line:
                break
        watch.cancel()
        browser.kill()
    return said


@pytest.mark.skipif(CHROME is None, reason="no chromium or chrome on the path")
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_the_page_lives_in_a_browser(file: Path, results: Path, tmp_path: Path, size: str) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(file.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    lines = console(probed, tmp_path / "profile", size)
    assert lines, "the browser said nothing"
    assert "PROBE" in lines[-1], lines
    said = dict(word.split("=", 1) for word in lines[-1].partition("PROBE ")[2].partition(" END")[0].split())
    assert said["all"] == str(len(frame.current(frame.load(results)[0])))
    assert int(said["plots"]) >= 1
    assert said["overflow"] == "0", "nothing but the table scrolls sideways"
    assert said["methods"] == "mita"
    assert said["sorted"] == "true"
    assert not [line for line in lines if ":ERROR:" in line or ":WARNING:" in line or re.search(r"Error|Refused|violates", line)]


def test_names_come_from_the_registry(results: Path) -> None:
    rows = joined.rows(frame.load(results)[0])
    families = [series.family_rank(series.family(r["method"])) for r in rows]
    assert families == sorted(families), "in the taxonomy's order"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of records of every suite that trains."""
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    folder = tmp_path_factory.mktemp("trained") / "results"
    axes = {"accuracy": {"data": ["pathfinder"], "n": [1024, 4096]}, "swap_in": {"data": ["mqar"], "n": [256]}}
    for name, values in axes.items():
        synthetic.write(folder, name, synthetic_trained.records(name, seed=[0, 1], **values))
    synthetic.write(folder, "accuracy-cost", synthetic_trained.costs((1024,)))
    assert call("report", folder, "--html", folder.parent / "page.html").exit_code == 0
    return folder.parent / "page.html"


def test_every_figure_of_trained_models_is_on_the_page_with_its_numbers(trained: Path) -> None:
    text = trained.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    captions = {caption.partition(",")[0] for caption in page.data["figcaption"]}
    names = {"accuracy", "accuracy time", "accuracy memory", "curves", "swap in", "swap heat", "pruned", "busiest", "expert load", "kept"}
    assert names <= captions
    assert "swap heat, MiTA in mqar, trained with Softmax, N=256" in page.data["figcaption"]
    plots = {c: unpacked(t) for c, t in zip(page.data["figcaption"], [t for t in page.data["script"] if t.startswith("eN")], strict=False)}
    for caption, item in plots.items():
        assert '"method"' in item, f"{caption} cannot be filtered"
        assert '"series"' in item, caption
    summaries = [s for s in page.data["summary"] if ": " in s and s.startswith(("accuracy", "swap_in"))]
    assert len([s for s in summaries if s.startswith("accuracy: ")]) == 1, "one section a suite and device, however its figures are split"


TRAINED = """<script>setTimeout(() => {
  const form = document.getElementById("filters"), said = [], say = (name, text) => said.push(name + "=" + text);
  const table = document.querySelector("#joined table"), body = table.tBodies[0];
  const column = (i) => [...body.rows].map((r) => r.cells[i].textContent);
  const at = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "pathfinder");
  say("rows", body.rows.length);
  table.tHead.rows[0].cells[at].querySelector("button").click();
  const values = column(at).map(parseFloat), numbers = values.filter((v) => !Number.isNaN(v));
  say("sorted", numbers.every((v, i) => v === values[i] && (!i || numbers[i - 1] <= v)));
  form.elements.topology.value = "N-to-m"; form.dispatchEvent(new Event("input"));
  say("methods", [...new Set([...body.rows].filter((r) => !r.hidden).map((r) => r.dataset.method))].join());
  say("overflow", document.documentElement.scrollWidth - document.documentElement.clientWidth);
  form.reset();
  const row = document.querySelector("#cells tbody tr details"); row.open = true;
  setTimeout(() => { say("again", row.textContent.replaceAll(" ", "_")); console.log("PROBE " + said.join(" ") + " END"); }, 1000);
}, 3000)</script></body>"""


@pytest.mark.skipif(CHROME is None, reason="no chromium or chrome on the path")
def test_the_joined_table_lives_in_a_browser(trained: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    probed.write_text(trained.read_text(encoding="utf-8").replace("</body>", TRAINED), encoding="utf-8")
    lines = console(probed, tmp_path / "profile", "390,844")
    assert lines, "the browser said nothing"
    assert "PROBE" in lines[-1], lines
    said = dict(word.split("=", 1) for word in lines[-1].partition("PROBE ")[2].partition(" END")[0].split())
    assert (said["rows"], said["methods"], said["sorted"], said["overflow"]) == ("26", "mita", "true", "0")
    assert "environment_env0" in said["again"], "what runs a cell again is unpacked when it is asked for"
    assert not [line for line in lines if ":ERROR:" in line or ":WARNING:" in line or re.search(r"Error|Refused|violates", line)]
