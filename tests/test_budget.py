"""Budgets: a query reads as many hidden units as was asked for, whatever the method, and a record says what was asked."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cli_support import SUITE, answer, call

import attnbench
from attnbench import fastweights, runner, store, suite_file
from attnbench.case import Case
from attnbench.errors import UserError
from attnbench.inputs import draw
from attnbench.method import Method, Shape
from attnbench.protocol import Protocol
from attnbench.record import Record, Status
from attnbench.suite import Entry, Suite

if TYPE_CHECKING:
    from pathlib import Path

ADJUSTABLE = [name for name in attnbench.methods() if attnbench.get(name).budget]
POINTS = [(144, 16), (144, 36), (576, 36), (576, 64), (576, 144)]
TOLERANCE = 0.15


def params(method: Method, shape: Shape, units: int, **given: object) -> Any:
    """The parameters that the budget chooses; they must make sense at that shape."""
    assert method.budget is not None
    found = method.parse({**given, **method.budget(shape, method.parse(given), units)})
    assert found.problems(shape) == []
    return found


def width(method: Method, shape: Shape, units: int, **given: object) -> float:
    """Hidden units that a query reads, counted in the fast weights."""
    assert method.experts is not None, "what is set by a budget must be countable"
    return fastweights.width_per_query(
        method.experts(*draw("randn", shape, 0, torch.float64, "cpu"), params(method, shape, units, **given))
    )


@pytest.mark.parametrize(("n", "units"), POINTS)
@pytest.mark.parametrize("name", ADJUSTABLE)
def test_a_query_reads_what_was_asked_for(name: str, n: int, units: int) -> None:
    found = width(attnbench.get(name), Shape(1, 2, n, 8), units)
    assert abs(found - units) <= TOLERANCE * units, f"{found} units, not {units}"


NEAREST = {("bra", 128): "regions are squares, short at the ends of a grid", ("pvt", 128): "the grid shrinks by whole numbers"}
"""At the lengths of the suite, what comes no nearer, and why."""


@pytest.mark.parametrize("name", ADJUSTABLE)
def test_at_a_length_of_the_suite_only_what_is_named_is_further_off(name: str) -> None:
    budgets, method = suite_file.load("equal-width").axes["budget"], attnbench.get(name)
    given = {"topk": 2} if name == "moba" else {}
    found = {units: width(method, Shape(1, 2, 1024, 8), units, **given) for units in budgets}
    assert {(name, u) for u, w in found.items() if abs(w - u) > TOLERANCE * u} == {key for key in NEAREST if key[0] == name}, found


@pytest.mark.parametrize("name", ADJUSTABLE)
def test_a_larger_budget_is_a_wider_query(name: str) -> None:
    shape = Shape(1, 2, 576, 8)
    found = [width(attnbench.get(name), shape, units) for units in (16, 64, 256)]
    assert found == sorted(found)
    assert found[2] > 2 * found[1] > 4 * found[0]


@pytest.mark.parametrize("name", ADJUSTABLE)
def test_budgets_name_parameters_that_there_are_and_only_those_that_differ(name: str) -> None:
    method, shape = attnbench.get(name), Shape(1, 2, 576, 8)
    assert method.budget is not None
    assert method.budget.__doc__
    small, large = (method.budget(shape, method.params(), units) for units in (16, 64))
    assert set(small) == set(large) <= set(method.params().as_dict())
    assert small != large


def test_methods_of_a_fixed_width_have_no_budget() -> None:
    fixed = set(attnbench.methods()) - set(ADJUSTABLE)
    assert {"softmax", "linear", "flash_attn", "xformers"} <= fixed
    assert {"mita", "agent", "nystromformer", "topk", "sliding_window", "moba", "spark", "dsa"} <= set(ADJUSTABLE)


@pytest.mark.parametrize("units", [9, 64, 144])
@pytest.mark.parametrize(
    "given",
    [{}, {"shared": False}, {"routed": False}, {"experts_per_query": 2}, {"grid": "square"}, {"grid": "square", "routed": False}],
    ids=str,
)
def test_mita_splits_its_budget_by_what_queries_read(given: dict[str, Any], units: int) -> None:
    method, shape = attnbench.get("mita"), Shape(1, 2, 576, 8)
    found = params(method, shape, units, **given)
    assert abs(width(method, shape, units, **given) - units) <= max(1, TOLERANCE * units)
    if found.shared and found.routed and found.grid == "none":
        assert abs(found.landmarks - found.experts_per_query * found.topk) <= 2
    if not found.shared:
        assert found.experts_per_query * found.topk == units


@pytest.mark.parametrize(("units", "landmarks"), [(16, 16), (20, 16), (21, 25), (64, 64), (128, 121)])
def test_landmarks_on_a_grid_are_the_nearest_square_number(units: int, landmarks: int) -> None:
    assert params(attnbench.get("agent"), Shape(1, 2, 576, 8), units, grid="square").landmarks == landmarks


def made(axes: dict[str, tuple[Any, ...]], *entries: Entry, aa: bool = False) -> Suite:
    return Suite("made", "Made", "", "speed", entries, axes, Protocol(aa=aa))


def settings(cases: Any) -> set[tuple[Any, ...]]:
    return {(c.method, c.n, dict(c.params).get("topk"), dict(c.params).get("landmarks")) for c in cases}


def test_a_suite_sweeps_budgets_and_fixed_methods_run_once() -> None:
    planned = made({"n": (64, 128), "budget": (16, 32)}, Entry("mita"), Entry("topk"), Entry("linear")).planned()
    assert settings(planned) == {
        *(("mita", n, k // 2, k // 2) for n in (64, 128) for k in (16, 32)),
        *(("topk", n, k, None) for n in (64, 128) for k in (16, 32)),
        *(("linear", n, None, None) for n in (64, 128)),
    }
    assert {(c.method, b) for c, b in planned.items()} == {
        ("mita", (16,)),
        ("mita", (32,)),
        ("topk", (16,)),
        ("topk", (32,)),
        ("linear", ()),
    }
    assert [c.n for c in planned] == sorted(c.n for c in planned)


def test_a_budget_replaces_what_a_suite_sets_but_not_what_the_user_does() -> None:
    base = made({"n": (64,)}, Entry("topk", {"topk": (4, 5)}), Entry("mita", {"landmarks": (9,), "topk": (3,), "routed": (False,)}))
    assert settings(base.override({"budget": [16]}, [], {}).expand()) == {("topk", 64, 16, None), ("mita", 64, 3, 16)}
    mine = base.override({"budget": [16]}, [], {"mita": {"landmarks": 7}, "topk": {"topk": ["6", "8"]}})
    assert settings(mine.expand()) == {("topk", 64, 6, None), ("topk", 64, 8, None), ("mita", 64, 3, 7)}


def test_a_cell_that_several_budgets_ask_for_runs_once_and_says_so() -> None:
    planned = made({"n": (64,), "budget": (24, 25, 26, 40)}, Entry("agent", {"grid": ("square",)}), aa=True).planned()
    found = {(dict(c.params)["landmarks"], c.replicate): b for c, b in planned.items()}
    assert found == {(25, 0): (24, 25, 26), (25, 1): (24, 25, 26), (36, 0): (40,), (36, 1): (40,)}


def test_the_same_parameters_are_the_same_case_however_they_were_asked_for() -> None:
    (asked,) = made({"n": (64,), "budget": (16,)}, Entry("topk")).expand()
    (set_by_hand,) = made({"n": (64,)}, Entry("topk", {"topk": (16,)})).expand()
    assert asked.case_id == set_by_hand.case_id


@pytest.mark.parametrize(
    ("axes", "names", "line"),
    [
        ({"n": (64,), "budget": (65,)}, ["topk"], "suite made: budget = 65 exceeds N = 64: lower the budget, or raise N"),
        ({"n": (64,), "budget": (0,)}, ["topk"], "budget = 0 must be a whole number of at least 1"),
        ({"n": (64,), "budget": ("few",)}, ["topk"], "budget = 'few' must be a whole number of at least 1"),
        ({"n": (64,), "budget": (16,)}, ["softmax", "linear"], "no budget sets what softmax, linear read: leave the budget out"),
        ({"n": (64,), "budget": (16,)}, ["nsa"], r"nsa read \(nsa: it reads N / stride compressed keys and .*\): leave the budget out"),
    ],
)
def test_a_budget_that_makes_no_sense_is_one_line(axes: dict[str, tuple[Any, ...]], names: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        made({}, *map(Entry, names)).override(axes, [], {}).expand()
    assert "\n" not in str(raised.value)


def test_a_record_says_what_was_asked_and_its_command_asks_again(tmp_path: Path) -> None:
    from attnbench.cli._options import read_axes, read_budget, read_settings

    path = tmp_path / "small.toml"
    path.write_text(SUITE.replace("n = [16, 32, 48, 64]", "n = [16]\nbudget = [4, 8]"))
    chosen = replace(suite_file.load(str(path)), protocol=Protocol(budget_s=0.01, aa=False))
    summary = runner.sweep(chosen, tmp_path / "results", device="cpu")
    assert {(r.case.method, r.budget) for r in summary.records} == {("softmax", ()), ("topk", (4,)), ("topk", (8,))}
    assert {r.status for r in summary.records} == {Status.OK}
    for record in store.read(summary.folder / store.RECORDS).records:
        words = record.command.split()
        given = {flag: [words[i + 1] for i, w in enumerate(words) if w == flag] for flag in ("--axis", "--set", "--budget", "--method")}
        assert given["--budget"] == ([f"keys={record.budget[0]}"] if record.budget else [])
        axes = read_axes(given["--axis"]) | read_budget(*given["--budget"] or [None])
        assert [c.case_id for c in chosen.override(axes, given["--method"], read_settings(given["--set"])).expand()] == [
            record.case.case_id
        ]


def test_records_of_before_read_as_asked_for_by_nobody() -> None:
    line = Record(Case(task="speed", method="softmax"), Status.OK, "env").to_json()
    assert Record.from_json(line).budget == ()
    assert Record.from_json(line.replace('"budget":[],', "")).budget == ()
    assert Record.from_json(line.replace('"budget":[]', '"budget":[4,8]')).budget == (4, 8)


def test_plan_shows_budgets_and_what_is_fixed() -> None:
    found = answer("plan", "quick", "--budget", "keys=32", "--axis", "n=128", "--axis", "mode=forward", "--json")
    by_method = {cell["method"]: cell for cell in found["cells"]}
    assert by_method["topk"]["budget"] == by_method["mita"]["budget"] == [32]
    assert by_method["softmax"]["budget"] == []
    assert by_method["topk"]["case"]["params"]["topk"] == 32
    text = call("plan", "quick", "--budget", "keys=32", "--axis", "n=128", "--method", "topk", "--method", "linear").stdout
    assert "fixed" in text
    assert "fixed" not in call("plan", "quick", "--axis", "n=128", "--method", "topk", "--method", "linear").stdout


def test_show_says_what_sets_the_width() -> None:
    assert answer("show", "mita", "--json")["budget"] == ["landmarks", "topk"]
    assert "what a query reads is set by landmarks, topk (--budget)" in call("show", "mita").stdout
    assert "what a query reads is fixed" in call("show", "softmax").stdout
    assert "--budget cannot set what a query reads: it reads N / stride compressed keys" in call("show", "nsa").stdout.replace("\n", " ")


@pytest.mark.parametrize("n", [256, 1024])
def test_nsa_never_reads_as_little_as_budgets_ask(n: int) -> None:
    """The least that any stride leaves, with one block as long as it, is what `no_budget` says."""
    method, shape = attnbench.get("nsa"), Shape(1, 2, n, 8)
    assert method.no_budget
    assert method.experts is not None
    found = []
    for side in (2**i for i in range(1, 8)):
        own = method.parse({"compress": side, "stride": side, "block": side, "topk": 1, "first": 0, "local": 0, "window": 1})
        assert own.problems(shape) == []
        found.append(fastweights.width_per_query(method.experts(*draw("randn", shape, 0, torch.float64, "cpu"), own)))
    assert min(found) == 2 * n**0.5 + 1
