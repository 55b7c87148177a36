"""The folder for a paper: what is marked, what is cited, what is stated, and that LaTeX takes it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import synthetic
from cli_support import call

import attnbench
from attnbench import bibtex, compare, frame, paper, series, tables
from attnbench.errors import UserError
from attnbench.figures._style import WIDTHS
from attnbench.method import Citation

if TYPE_CHECKING:
    from pathlib import Path

    from attnbench.record import Record

METHODS = ("softmax@cudnn", "flash_attn", "mita", "linear")
LENGTHS = (1024, 4096, 16384, 65536, 262144)
TEX = shutil.which("pdflatex") and shutil.which("bibtex")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    keep = [r for r in synthetic.speed(LENGTHS) if r.case.label in METHODS and r.case.mode == "forward"]
    synthetic.write(folder, "speed", [*keep, synthetic.failed(synthetic.case("topk", {"topk": 64}, n=65536), "oom")])
    near = [r for r in synthetic.fidelity((1024,)) if r.case.label in ("softmax", *METHODS) and r.case.profile == "randn"]
    return synthetic.write(folder, "fidelity", near)


@pytest.fixture(scope="module")
def made(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "paper"
    printed = call("paper", results, "--out", out)
    assert printed.exit_code == 0, printed.stderr
    assert set(printed.stdout.split()) == {str(p) for p in out.rglob("*") if p.is_file()}
    return out


def text(folder: Path, pattern: str) -> str:
    return "".join(p.read_text() for p in sorted(folder.glob(pattern)))


# --- the best ---


def times(*seconds: tuple[str, float]) -> list[Record]:
    return [synthetic.ok(synthetic.case(label, n=1024), time, spread=0.01) for label, time in seconds]


def again(time: float, apart: float) -> list[Record]:
    return [synthetic.ok(synthetic.case("softmax", n=1024, replicate=1), time * apart, spread=0.01)]


@pytest.mark.parametrize(
    ("records", "best"),
    [
        (times(("softmax", 2e-3), ("linear", 1e-3), ("mita", 3e-3)), "Linear"),
        (times(("softmax", 2e-3), ("linear", 1e-3), ("mita", 1.0005e-3)), None),
        ([*times(("softmax", 2e-3), ("linear", 1e-3)), *again(2e-3, 1.02)], "Linear"),
        ([*times(("softmax", 2e-3), ("linear", 1e-3)), *again(2e-3, 2.0)], None),  # within the noise floor
        ([*times(("softmax", 2e-3)), synthetic.failed(synthetic.case("linear", n=1024), "oom")], None),  # nothing to be faster than
    ],
)
def test_the_fastest_is_bold_only_where_every_other_is_separably_slower(records: list[Record], best: str | None, tmp_path: Path) -> None:
    (table,) = tables.report(frame.load(synthetic.write(tmp_path, "s", records))[0])
    assert [table.rows[i][0] for i, _ in table.best] == ([best] if best else [])
    assert all(table.header[j].startswith("N=1024") for _, j in table.best)
    assert table.latex().count(r"\textbf{") == len(table.best)
    assert ("Bold:" in table.latex()) == bool(best)
    assert "**" not in table.markdown()


def test_two_names_of_one_thing_do_not_hide_that_it_is_the_fastest() -> None:
    alike = {"status": "ok", "method": "a", "implementation": "x", "params": "{}"}
    fast = [alike | {"time_s": 1.0 + i / 1e3, "samples_s": (1.0, 1.001, 1.002)} for i in range(2)]
    slow = alike | {"method": "b", "time_s": 2.0, "samples_s": (2.0, 2.001, 2.002)}
    assert compare.fastest([*fast, slow], []) is fast[0]
    assert compare.fastest(fast, []) is None


# --- citations ---


def test_an_entry_is_what_bibtex_reads() -> None:
    work = Citation("Müller et al.", 2024, "On the 50% Rule of A_B & C", "https://arxiv.org/abs/2401.01234", "NeurIPS")
    assert bibtex.key(work) == "muller202450"
    assert bibtex.entry(work).splitlines() == [
        "@inproceedings{muller202450,",
        "  author = {Müller and others},",
        r"  title = {{On the 50\% Rule of A\_B \& C}},",
        "  booktitle = {NeurIPS},",
        "  year = {2024},",
        "  eprint = {2401.01234},",
        "  archiveprefix = {arXiv},",
        r"  note = {\url{https://arxiv.org/abs/2401.01234}},",
        "}",
    ]
    assert bibtex.entry(Citation("Dao", 2023, "FlashAttention-2", "https://example.org", "arXiv")).startswith(
        "@misc{dao2023flashattention,"
    )


def test_every_method_has_an_entry_and_no_two_works_share_a_key() -> None:
    works = {attnbench.get(name).citation for name in attnbench.methods()}
    listed = bibtex.bibliography(works)
    assert len(re.findall(r"^@", listed, re.MULTILINE)) == len({w.title for w in works})
    assert listed.count("{") == listed.count("}")


# --- the folder ---


def _width_pt(path: Path) -> float:
    """Of a page of a PDF."""
    found = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", path.read_bytes())
    assert found is not None, path
    return float(found[1])


def test_every_method_of_the_results_is_cited_and_every_citation_has_an_entry(made: Path) -> None:
    cited = set(re.findall(r"\\cite\{(\w+)\}", text(made, "tables/methods.tex")))
    entries = set(re.findall(r"^@\w+\{(\w+),", text(made, "references.bib"), re.MULTILINE))
    assert cited == entries >= {"vaswani2017attention", bibtex.key(attnbench.get("mita").citation)}


def test_captions_state_the_conditions(made: Path) -> None:
    for pattern in ("tables/speed*.tex", "figures/speed*.tex"):
        for path in made.glob(pattern):
            caption = re.findall(r"\\caption\{(.*)\}", path.read_text())[0]
            heads = "H=4/16" if "pareto" in path.name else "H=16"
            for part in ("Test GPU 80GB", f"B=1, {heads}, D=64", "bfloat16", "L2 cold", "topk=64", "A/A pairs"):
                assert part in caption, path


def test_figures_are_vectors_and_each_is_in_the_document(made: Path) -> None:
    names = {p.stem for p in (made / "figures").glob("*.pdf")}
    assert {"speed-latency-test-gpu-80gb", "speed-memory-test-gpu-80gb", "fidelity-pareto-test-gpu-80gb"} <= names
    assert {p.suffix for p in (made / "figures").iterdir()} == {".pdf", ".csv", ".tex"}
    inputs = set(re.findall(r"\\input\{([\w/.-]+)\.tex\}", text(made, "main.tex")))
    assert inputs == {
        p.relative_to(made).with_suffix("").as_posix() for folder in ("figures", "tables") for p in made.glob(f"{folder}/*.tex")
    }
    assert {p.stem for p in made.glob("figures/*.tex")} == names
    for path in made.glob("figures/*.tex"):
        wide = r"\begin{figure*}" in path.read_text()
        assert (r"width=\textwidth" if wide else r"width=\columnwidth") in path.read_text()
        assert wide == (_width_pt(path.with_suffix(".pdf")) > 72 * WIDTHS[1] + 1), path


def test_tables_have_few_columns_unless_lengths_are_asked_for(made: Path, results: Path) -> None:
    header = text(made, "tables/speed-test-gpu-80gb-forward.tex").split(r"\midrule")[0]
    assert re.findall(r"N=(\d+) \(ms\)", header) == ["1024", "4096", "65536", "262144"]
    assert [len(paper.spread(range(n))) for n in (0, 1, 2, 4, 9)] == [0, 1, 2, 4, 4]
    loaded = frame.load(results)[0]
    asked = paper.contents(loaded, [], [16384])["tables/speed-test-gpu-80gb-forward.tex"]
    assert re.findall(r"N=(\d+) \(ms\)", asked) == ["16384"]
    assert "oom" in text(made, "tables/speed-test-gpu-80gb-forward.tex")


def test_suites_with_other_lengths_keep_their_own(tmp_path: Path, results: Path) -> None:
    shutil.copytree(results, tmp_path / "r")
    odd = [synthetic.ok(synthetic.case(label, n=n), 1e-3 * n) for label in ("softmax", "linear") for n in (49, 196, 784)]
    found = {t.name: t for t in paper.measured(frame.load(synthetic.write(tmp_path / "r", "speed-2", odd))[0])}
    assert [h for h in found["speed-2-test-gpu-80gb-forward"].header if h.endswith("(ms)")] == ["N=49 (ms)", "N=196 (ms)", "N=784 (ms)"]
    assert len([h for h in found["speed-test-gpu-80gb-forward"].header if h.endswith("(ms)")]) == 4
    assert any(h.startswith("error") for h in found["speed-2-test-gpu-80gb-forward"].header)
    assert "fidelity-test-gpu-80gb" in found


def test_provenance_names_every_file_and_every_source(made: Path, results: Path) -> None:
    told = json.loads(text(made, "provenance.json"))
    files = {p.relative_to(made).as_posix(): p for p in made.rglob("*") if p.is_file() and p.name != "provenance.json"}
    assert told["files"] == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    sources = {s["file"]: s for s in told["results"]}
    assert set(sources) == {p.relative_to(results).as_posix() for p in results.rglob("records.jsonl")}
    for name, source in sources.items():
        assert source["sha256"] == hashlib.sha256((results / name).read_bytes()).hexdigest()
        assert source["environments"]["env0"]["device"] == synthetic.DEVICE
    assert told["attnbench"] == attnbench.__version__
    assert told["remake"].startswith("attnbench paper ")


def test_the_same_records_give_the_same_bytes(made: Path, results: Path) -> None:
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert call("paper", results, "--out", made).exit_code == 0
    assert {p: p.read_bytes() for p in made.rglob("*") if p.is_file()} == before


def test_nothing_to_show_and_nowhere_to_write_are_one_line(tmp_path: Path, results: Path) -> None:
    (tmp_path / "file").write_text("")
    synthetic.write(tmp_path / "empty", "speed", [])
    for words in ((tmp_path / "none",), (tmp_path / "empty",), (results, "--out", tmp_path / "file")):
        answer = call("paper", *words, *(() if "--out" in words else ("--out", tmp_path / "out")))
        assert answer.exit_code == 2
        assert len(answer.stderr.strip().splitlines()) == 1
    with pytest.raises(UserError, match="no records"):
        paper.contents(frame.load(tmp_path / "empty")[0], [])


@pytest.mark.skipif(not TEX, reason="pdflatex and bibtex are not installed")
def test_latex_takes_it(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "paper")
    latex = ("pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main")
    for command in (latex, ("bibtex", "main"), latex, latex):
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (folder / "main.log").read_text(errors="replace")
    assert not re.findall(r"^! |undefined|too large|Overfull \\hbox \(\d{3,}", log, re.MULTILINE)


def test_a_wide_figure_leaves_out_of_its_caption_what_its_small_print_says(results: Path) -> None:
    rows = next(g.rows for g in series.groups(frame.load(results)[0]) if series.settings(frame.current(g.rows)))
    settings = series.settings(frame.current(rows)).strip()
    assert settings in paper.Picture("x", "Title.", rows, 2).latex().replace("\\_", "_")
    assert settings in paper.Picture("x", "Title.", rows, 1, settings).latex().replace("\\_", "_")
    assert settings not in paper.Picture("x", "Title.", rows, 2, settings).latex().replace("\\_", "_")
