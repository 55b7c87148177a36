"""Cited numbers: read as they are written, drawn and listed beside ours and never taken for ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import synthetic
from figures_support import captioned

import attnbench
from attnbench import frame, references, registry, tables, typeset
from attnbench.errors import UserError
from attnbench.figures import _style, latency, memory, throughput
from attnbench.suite_file import load as suite

H100 = {**synthetic.ENVIRONMENT, "device": "NVIDIA H100 80GB HBM3"}
OURS_S, OURS_BYTES = 0.5e-3, 100 << 20
SETTING = {"landmarks": 64, "topk": 64}


def table(folder: Path, environment=H100, params=SETTING, **rest):
    """Our own times of the method that is cited, and of another."""
    cells = [
        synthetic.case(label, params if label == "mita" else {}, n=n, mode=mode, **rest)
        for label in ("mita", "softmax@flash")
        for mode in ("forward", "forward+backward")
        for n in (4096, 16384)
    ]
    return frame.load(synthetic.write(folder, "speed", [synthetic.ok(c, OURS_S, OURS_BYTES) for c in cells], environment))[0]


def test_the_numbers_are_those_of_the_source():
    found = {(c.conditions["batch"], c.params["topk"], c.mode, c.column): c.values for c in references.load()}
    ms = {key: {n: round(v * 1e3, 6) for n, v in values.items()} for key, values in found.items() if key[3] == references.TIME}
    assert ms == {
        (1, 64, "forward", "time_s"): {4096: 1.9, 16384: 2.5, 65536: 6.5},
        (1, 64, "forward+backward", "time_s"): {4096: 4.3, 16384: 5.0, 65536: 14.3},
        (64, 25, "forward", "time_s"): {784: 2.6, 3136: 6.2},
        (64, 25, "forward+backward", "time_s"): {784: 5.8, 3136: 13.7},
        (64, 49, "forward", "time_s"): {3136: 7.7},
        (64, 49, "forward+backward", "time_s"): {3136: 16.8},
    }
    assert found[64, 25, "forward+backward", "peak_bytes"] == {784: 1176 << 20, 3136: 2350 << 20}
    for one in references.load():
        assert {"url": "github.com/" in one.source, "commit": "commit" in one.source} == {"url": True, "commit": True}
        method = registry.get(one.method)
        assert method.parse(one.params), "its parameters are those of the method"


def test_every_cited_setting_is_asked_by_a_suite():
    cases = [c for name in ("speed", "vision") for c in suite(name).expand()]
    for one in references.load():
        same = [c for c in cases if c.method == one.method and c.mode == one.mode and one.params.items() <= dict(c.params).items()]
        same = [c for c in same if all(getattr(c, key) == value for key, value in one.conditions.items())]
        assert set(one.values) <= {c.n for c in same}, one.name(settings=True)


def test_cited_points_are_drawn_hollow_and_apart(tmp_path):
    rows = table(tmp_path)
    drawn = latency.data(rows)
    cited = drawn[drawn["kind"] == "cited"]
    assert set(cited["series"]) == {"MiTA (authors), cited"}
    forward = cited[cited["panel"] == "forward"]
    assert dict(zip(forward["n"], forward["value"], strict=True)) == pytest.approx({4096: 1.9, 16384: 2.5, 65536: 6.5})
    assert cited["ran"].str.contains("measured separately").all()
    assert cited["floor"].isna().all(), "nothing is known of its noise"
    figure = latency.build(rows)
    assert figure is not None
    lines = [line for axes in figure.axes for line in axes.lines if tuple(line.get_xdata()) == (4096, 16384, 65536)]
    assert [(line.get_linestyle(), line.get_fillstyle()) for line in lines] == [(":", "none")] * 2
    assert len({line.get_color() for line in lines} | {_style.look("mita")["color"]}) == 1
    caption = captioned(figure)
    assert "cited, not measured here. Authors' implementation, https://github.com/QishuaiWen/MiTA" in caption
    labels = [t.get_text() for axes in figure.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    assert labels == ["Softmax (flash)", "MiTA", "MiTA (authors), cited"]


def test_memory_is_cited_for_the_mode_it_was_measured_in(tmp_path):
    drawn = memory.data(table(tmp_path))
    cited = drawn[drawn["kind"] == "cited"]
    assert set(cited["panel"]) == {"forward+backward"}
    assert cited["value"].tolist() == [431, 722, 1977]
    assert (throughput.data(table(tmp_path / "b"))["kind"] == "series").all(), "nothing is derived from what is cited"


@pytest.mark.parametrize(
    ("why", "environment", "params", "rest"),
    [
        ("another device", synthetic.ENVIRONMENT, SETTING, {}),
        ("another setting", H100, {"landmarks": 64, "topk": 32}, {}),
        ("another batch", H100, SETTING, {"batch": 2}),
        ("another dtype", H100, SETTING, {"dtype": "float32"}),
        ("a graph", H100, SETTING, {"graph": True}),
    ],
)
def test_nothing_is_cited_beside_other_conditions(tmp_path, why, environment, params, rest):
    rows = table(tmp_path, environment, params, **rest)
    assert (latency.data(rows)["kind"] == "series").all(), why
    assert [t.notes for t in tables.report(rows)] == [(), ()], why


def test_settings_are_named_where_several_are_cited(tmp_path):
    cells = [
        synthetic.case("mita", {"landmarks": m, "topk": m, "grid": "square"}, n=n, batch=64, heads=6) for m in (25, 49) for n in (784, 3136)
    ]
    rows = frame.load(synthetic.write(tmp_path, "vision", [synthetic.ok(c, OURS_S) for c in cells], H100))[0]
    drawn = latency.data(rows)
    cited = drawn[drawn["kind"] == "cited"]
    assert set(cited["series"]) == {f"MiTA (authors), landmarks=topk={m}, cited" for m in (25, 49)}
    figure = latency.build(rows)
    assert figure is not None
    colours = {line.get_color() for axes in figure.axes for line in axes.lines if line.get_linestyle() == ":"}
    assert len(colours) == 2


def test_the_report_lists_them_below_with_their_ratio_to_ours(tmp_path):
    forward, both = tables.report(table(tmp_path))
    assert [row[0] for row in forward.rows] == ["Softmax (flash)", "MiTA"], "no row of the table is cited"
    (note,) = forward.notes
    ours = {int(h[2:].split()[0]): cell.split()[0] for h, cell in zip(forward.header, forward.rows[1], strict=True) if h.startswith("N=")}
    for n, ms in ((4096, 1.9), (16384, 2.5)):
        assert f"{ms} ms ({typeset.figures(ms / float(ours[n]))}{typeset.TIMES} ours) at N={n}" in note
    assert "65536" not in note, "a length that the table lacks"
    assert note.startswith("Cited, not measured here. MiTA (authors), landmarks=topk=64: 1.9 ms")
    assert note.endswith("measured separately from this repository's records, not in the same run.")
    assert "peak memory 431 MiB (4.31\N{MULTIPLICATION SIGN} ours) at N=4096" in both.notes[0]
    assert forward.markdown().endswith(f"{forward.caption}\n\n{note}\n")
    assert r"\footnotesize Cited, not measured here." in forward.latex()
    assert tables.report(table(tmp_path / "b"), [4096])[0].notes[0].count("at N=") == 1


def test_comparisons_and_the_store_know_nothing_of_them():
    root = Path(attnbench.__file__).parent
    users = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom | ast.Import) for a in n.names}
        if "references" in names:
            users.add(path.relative_to(root).as_posix())
    assert users == {"figures/_facets.py", "tables.py"}


GOOD = """
label = "X"
method = "topk"
device = "G"
source = "s"
[conditions]
dim = 8
dtype = "float32"
[[series]]
batch = 1
heads = 2
params = { topk = 4 }
n = [8, 16]
forward_ms = [1, 2]
"""


def test_a_file_is_read_as_the_package_says():
    (one,) = references.read(GOOD, "x.toml")
    assert (one.mode, one.values) == ("forward", {8: 1e-3, 16: 2e-3})
    assert one.conditions == {"dim": 8, "dtype": "float32", "batch": 1, "heads": 2}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('label = "X"', "", "x.toml lacks 'label'"),
        ('label = "X"', 'label = "X"\nsauce = "s"', "unknown key 'sauce' in x.toml: did you mean source"),
        ("dim = 8", "", "x.toml lacks 'dim'"),
        ("forward_ms = [1, 2]", "forward_ms = [1]", "forward_ms has 1 values for 2 lengths"),
        ("forward_ms", "forwards_ms", "unknown key 'forwards_ms' in x.toml: did you mean forward_ms"),
    ],
)
def test_a_mistake_in_a_file_is_named(old, new, message):
    with pytest.raises(UserError, match=message):
        list(references.read(GOOD.replace(old, new, 1), "x.toml"))
