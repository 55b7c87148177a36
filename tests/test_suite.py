"""Suites: reading, changing, expanding to cases, and the hash that names a case."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnbench import axes, suite_file
from attnbench.case import Case
from attnbench.errors import UserError
from attnbench.protocol import Protocol
from attnbench.registry import get, methods
from attnbench.suite import Entry, Suite
from attnbench.tasks import models, trained

if TYPE_CHECKING:
    from pathlib import Path

values = st.lists(st.integers(1, 4096), min_size=1, max_size=4, unique=True).map(tuple)
modes = st.sampled_from([("forward",), ("forward+backward",), ("forward", "forward+backward")])
cases = st.builds(
    Case,
    task=st.sampled_from(axes.CHOICES["task"]),
    method=st.sampled_from(["softmax", "topk", "linear"]),
    implementation=st.sampled_from(["", "eager"]),
    params=st.dictionaries(st.text("abc", min_size=1), st.booleans() | st.integers() | st.text('ab "é\n', max_size=4), max_size=3).map(
        lambda d: tuple(sorted(d.items()))
    ),
    batch=st.integers(1, 4),
    n=st.integers(1, 1 << 20),
    dtype=st.sampled_from(axes.CHOICES["dtype"]),
    mode=st.sampled_from(axes.CHOICES["mode"]),
    seed=st.integers(0, 9),
    graph=st.booleans(),
    replicate=st.integers(0, 1),
)


def made(axes: dict[str, tuple[Any, ...]], *entries: Entry, aa: bool = False) -> Suite:
    return Suite("made", "Made", "", "speed", entries or (Entry("softmax"),), axes, Protocol(aa=aa))


@given(n=values, batch=values, mode=modes, topk=st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True).map(tuple))
def test_expansion_is_the_product_of_axes_and_swept_parameters(
    n: tuple[int, ...], batch: tuple[int, ...], mode: tuple[str, ...], topk: tuple[int, ...]
) -> None:
    n = tuple(max(5, x) for x in n)
    found = made({"n": n, "batch": batch, "mode": mode}, Entry("softmax"), Entry("topk", {"topk": topk})).expand()
    points = set(itertools.product(n, batch, mode))
    want = {("softmax", None, *p) for p in points} | {("topk", k, *p) for k in topk for p in points}
    assert {(c.method, dict(c.params).get("topk"), c.n, c.batch, c.mode) for c in found} == want
    assert len(found) == len(want) == len({c.case_id for c in found})
    assert [c.n for c in found] == sorted(c.n for c in found), "a method that is too slow is found out at the shortest length"


@given(n=values, mode=modes)
def test_the_first_method_is_measured_twice_for_the_noise_floor(n: tuple[int, ...], mode: tuple[str, ...]) -> None:
    found = made({"n": n, "mode": mode}, Entry("softmax@eager"), Entry("linear"), aa=True).expand()
    again = {replace(c, replicate=0) for c in found if c.replicate}
    assert again == {c for c in found if c.label == "softmax@eager" and not c.replicate}
    assert made({"n": n, "mode": mode}, Entry("softmax@eager"), Entry("linear"), aa=True).expand() == found, (
        "the order is the same each time"
    )


@given(cases)
def test_a_case_survives_its_json_form_whatever_the_order_of_its_keys(case: Case) -> None:
    data = case.as_dict()
    shuffled = dict(reversed(data.items())) | {"params": dict(reversed(data["params"].items()))}
    again = Case.from_dict(shuffled)
    assert again == case
    assert again.case_id == case.case_id


@given(cases, cases)
def test_cases_share_an_id_only_where_they_are_equal(a: Case, b: Case) -> None:
    assert (a.case_id == b.case_id) == (a == b)


@given(cases, st.sampled_from([f.name for f in fields(Case)]))
def test_every_field_enters_the_id(case: Case, name: str) -> None:
    value = getattr(case, name)
    other = (*value, ("other", 1)) if isinstance(value, tuple) else (value + 1 if isinstance(value, int) else value + "x")
    assert replace(case, **{name: other}).case_id != case.case_id


def test_the_id_is_the_same_on_every_machine_and_in_every_process() -> None:
    assert Case(task="speed", method="softmax", params=(("causal", False),)).case_id == "a742ad80f0a248f2"


@given(cases, st.integers(1, 1 << 20))
def test_a_series_is_the_same_case_at_every_length(case: Case, n: int) -> None:
    assert replace(case, n=n, replicate=1 - case.replicate).series == case.series
    assert replace(case, batch=case.batch + 1).series != case.series


@pytest.mark.parametrize("name", suite_file.available())
def test_built_in_suites_expand_and_ask_something(name: str) -> None:
    loaded = suite_file.load(name)
    assert loaded.question.endswith("?")
    assert loaded.expand()


def test_the_suites_cover_what_they_promise() -> None:
    for name in ("speed", "graph", "vision", "fidelity"):
        assert {c.method for c in suite_file.load(name).expand()} == set(methods())
    # no rows that could be counted, a width that no budget sets, and softmax attention again
    assert set(methods()) - {c.method for c in suite_file.load("equal-width").expand()} == {"ttt", "vit3", "nsa", "flash_attn", "xformers"}
    speed = suite_file.load("speed").expand()
    assert {c.n for c in speed} == {1024 << i for i in range(9)}
    assert {(c.batch, c.heads, c.dim, c.dtype) for c in speed} == {(1, 16, 64, "bfloat16")}
    budgets = {(dict(c.params)["landmarks"], dict(c.params)["topk"]) for c in suite_file.load("vision").expand() if c.method == "mita"}
    assert budgets == {(25, 25), (49, 49)}
    assert {c.profile for c in suite_file.load("fidelity").expand()} == {"randn", "clustered", "needle", "local"}


def test_the_graph_suite_asks_only_what_a_graph_can_hold() -> None:
    graph, speed = suite_file.load("graph"), suite_file.load("speed")
    cases = graph.expand()
    assert {c.graph for c in cases} == {True}
    assert {(c.n, c.mode) for c in cases} == {(1024 << i, mode) for i in range(7) for mode in axes.CHOICES["mode"]}
    for entry in graph.methods:
        assert entry in speed.methods, "settings are those of speed, so that the two can be laid beside each other"
        method = get(entry.name)
        best = method.implementation(method.pinned) if method.pinned else method.all_implementations()[0]
        assert not best.limits.no_graph, f"{entry.name} would fall back to a slower implementation"


def test_override_changes_axes_methods_and_parameters() -> None:
    base = made({"n": (64,)}, Entry("topk", {"topk": (4,)}), Entry("softmax"))
    changed = base.override({"n": ["8", "16"]}, ["topk", "linear"], {"topk": {"topk": ["2", "3"]}}).expand()
    assert {(c.method, dict(c.params).get("topk"), c.n) for c in changed} == {
        *(("topk", k, n) for k in (2, 3) for n in (8, 16)),
        *(("linear", None, n) for n in (8, 16)),
    }
    assert base.override({}, [], {}).expand() == base.expand()


GOOD = 'task = "speed"\n[axes]\nn = [64]\n[[method]]\nname = "topk"\ntopk = 8\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('task = "speed"', 'task = "speed"\ncolour = 1', r"unknown key 'colour' in .*bad.toml"),
        ('task = "speed"', "", r"bad.toml lacks 'task'"),
        ('task = "speed"', 'task = "sped"', "did you mean speed"),
        ("n = [64]", "m = [64]", r"unknown axis 'm' in suite .*bad.toml"),
        ("n = [64]", "n = []", "axis n has no values"),
        ("n = [64]", "n = [0]", "n = 0"),
        ("n = [64]", 'n = ["many"]', "many"),
        ("n = [64]", 'n = [64]\ndtype = "float8"', "unknown value of dtype 'float8'"),
        ("n = [64]", 'n = [64]\nprofile = "rand"', "unknown profile 'rand'.*did you mean randn"),
        ("n = [64]", 'n = [64]\ngraph = "maybe"', "must be true or false"),
        ("n = [64]", "n = [64]\n[fixed]\nn = 5", "under both"),
        ("n = [64]", "n = [64]\n[measure]\nbudget = 1", r"unknown key 'budget' in .*\[measure\]"),
        ("n = [64]", "n = [64]\n[measure]\nbudget_s = 0", "budget_s = 0 must be above 0"),
        ("n = [64]", "n = [4]", "topk = 8 exceeds M .* = 4: lower topk"),
        ('name = "topk"', "", "lacks its name"),
        ('name = "topk"', 'name = "tokp"', "unknown method 'tokp': did you mean topk"),
        ("topk = 8", "top = 8", "unknown parameter 'top' in topk: did you mean topk"),
        ("topk = 8", 'topk = "8.5"', "topk.topk = '8.5' is not of type int"),
        ("[axes]", "[axes", "not valid TOML"),
        ("topk = 8", "topk = [8,", r"not valid TOML: Invalid value \(at the end of what begins at line 6\)"),
        ("n = [64]", 'n = [64]\ndtype = "\udcff"', "line 4: byte 0xff is no UTF-8"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=message) as raised:
        suite_file.load(str(path)).expand()
    assert "\n" not in str(raised.value).strip()


def test_the_good_suite_of_the_mistakes_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    assert [(c.method, c.n, c.replicate) for c in sorted(suite_file.load(str(path)).expand(), key=lambda c: c.replicate)] == [
        ("topk", 64, 0),
        ("topk", 64, 1),
    ]


def test_a_suite_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="unknown suite 'sped': did you mean speed"):
        suite_file.load("sped")
    with pytest.raises(UserError, match=r"cannot read suite absent.toml: No such file"):
        suite_file.load("absent.toml")


LEVELED = """
title = "Own"
question = "Which?"
task = "accuracy"
fixed = { steps = 4, depth = 1, rates = "1e-3" }
point = [{ data = "mqar", n = 16 }, { data = "pathfinder:easy", n = 256 }]
method = [{ name = "softmax" }]
"""


def test_a_level_without_points_gets_those_of_another_level_and_trains_on_a_finite_set(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(LEVELED)
    own = suite_file.load(str(tmp_path / "own.toml"))

    def points(name: str) -> set[tuple[str, int]]:
        return {(c.data, c.n) for c in own.override({"data": [name]}, [], {}).expand()}

    assert points("pathfinder:easy") == {("pathfinder:easy", 256)}
    assert points("pathfinder:intermediate") == {("pathfinder:intermediate", 256)}
    assert points("pathfinder:hard") == points("pathfinder") == {("pathfinder", 256)}, "one task, one name, the same cases"
    assert points("listops") == {("listops", 16)}
    case = next(c for c in own.expand() if c.data == "pathfinder:easy")
    assert models.recipe(case, 1e-3).examples == models.EXAMPLES
    assert models.architecture(case, trained.get(case.data)).grid == (16, 16)
