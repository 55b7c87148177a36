"""The suite of accuracy: its points, what it asks for and may cost, mistakes in one line, and a run of it on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cli_support import call

from attnbench import store, suite, suite_file
from attnbench.cli._options import read_axes, read_budget, read_settings
from attnbench.errors import UserError
from attnbench.record import Status
from attnbench.tasks.swapped import base

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
question = "Does it?"
task = "accuracy"
[fixed]
n = 16
steps = 4
depth = 1
rates = "1e-3"
[[point]]
data = "mqar"
[[point]]
data = "pathfinder"
n = 256
[[method]]
name = "softmax"
"""


def loaded(tmp_path: Path, text: str = GOOD) -> suite.Suite:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return suite_file.load(str(path))


def test_points_are_products_of_their_own(tmp_path: Path) -> None:
    own = loaded(tmp_path)
    assert {(c.data, c.n) for c in own.expand()} == {("mqar", 16), ("pathfinder", 256)}
    assert {(c.data, c.n) for c in own.override({"n": ["64"]}, [], {}).expand()} == {("mqar", 64), ("pathfinder", 64)}
    assert {(c.data, c.n) for c in own.override({"data": ["pathfinder"]}, [], {}).expand()} == {("pathfinder", 256)}
    assert {(c.data, c.n) for c in own.override({"data": ["listops"]}, [], {}).expand()} == {("listops", 16)}
    both = own.override({"data": ["mqar"], "causal": ["true", "false"]}, [], {}).expand()
    assert {dict(c.params)["causal"] for c in both} == {True, False}


def test_a_length_selects_the_points_that_have_it() -> None:
    def sizes(**axes: list[str]) -> set[tuple[str, int, int]]:
        return {(c.data, c.n, c.batch) for c in suite_file.load("accuracy").override(axes, ["softmax"], {}).expand()}

    assert sizes(data=["mqar"], n=["256", "1024"]) == {("mqar", 256, 64), ("mqar", 1024, 32)}
    assert sizes(data=["mqar"], n=["32"]) == {("mqar", 32, 64)}, "no point has it: the first, at that length"
    assert sizes(n=["4096"]) == {("mqar:graded", 4096, 16), ("pathfinder:graded", 4096, 16), ("digits", 4096, 16)}
    assert sizes(n=["256", "2048"]) == {("mqar", 256, 64), ("listops", 2048, 32)}, "a task without a point of either is left out"
    assert sizes(data=["listops"], n=["4096"]) == {("listops", 4096, 32)}
    assert sizes(data=["mqar", "digits"], n=["256"]) == {("mqar", 256, 64), ("digits", 256, 32)}, "a task that is named is not left out"
    assert sizes(data=["mqar"], n=["256", "512"]) == {("mqar", 256, 64), ("mqar", 512, 64)}
    assert sizes(data=["digits"], n=["64"], batch=["8"]) == {("digits", 64, 8)}


def test_methods_with_a_grid_get_the_grid_of_the_image(tmp_path: Path) -> None:
    cases = loaded(tmp_path).override({}, ["mita"], {"mita": {"landmarks": ["4"], "topk": ["4"]}}).expand()
    assert {(c.data, dict(c.params)["grid"]) for c in cases} == {("mqar", "none"), ("pathfinder", "16x16")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('data = "mqar"', 'data = "mqra"', "unknown trained task 'mqra': did you mean mqar"),
        ('rates = "1e-3"', 'rates = "fast"', "rates = 'fast' are no learning rates: write them as 3e-4/1e-3"),
        ('rates = "1e-3"', 'rates = "0"', "are no learning rates"),
        ('rates = "1e-3"', "", "task accuracy needs rates"),
        ("steps = 4", "steps = 0", "steps = 0 must be a whole number of at least 1"),
        ("n = 256", "n = 250", "N = 250 is no square"),
        ("depth = 1", 'depth = 1\npositions = "rotory"', "did you mean rotary"),
        ("depth = 1", 'depth = 1\ntrained_with = "mita:topk"', "'topk' sets no parameter"),
        ("depth = 1", 'depth = 1\ntrained_with = "mita:top=3"', "unknown parameter 'top' in mita"),
        ("depth = 1", 'depth = 1\ncausal = "perhaps"', "causal = 'perhaps' must be true or false"),
        ('data = "pathfinder"', 'data = "listops:/a/folder"', "task listops reads no folder"),
        ('data = "pathfinder"', 'data = "images:/not/there"', "/not/there"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        loaded(tmp_path, GOOD.replace(old, new, 1)).expand()
    assert "\n" not in str(raised.value)


def test_the_suite_asks_for_every_task_and_method_with_three_seeds() -> None:
    cases = suite_file.load("accuracy").expand()
    assert {c.seed for c in cases} == {0, 1, 2}
    assert {(c.data, c.n) for c in cases} == {
        ("mqar", 256), ("mqar", 1024), ("mqar:graded", 4096), ("listops", 2048),
        *((name, n) for name in ("pathfinder:graded", "digits") for n in (1024, 4096)),
    }  # fmt: skip
    grids = {(c.data, c.n, c.rates) for c in cases}
    assert len(grids) == len({(data, n) for data, n, _ in grids}), "the same learning rates for every method"
    assert {(dict(c.params)["shared"], dict(c.params)["routed"]) for c in cases if c.method == "mita"} == {
        (True, True), (False, True), (True, False),
    }  # fmt: skip


def test_models_that_are_swapped_are_those_of_the_suite_of_accuracy() -> None:
    swapped_in = {base(c).case_id for c in suite_file.load("swap_in").expand()}
    assert len(swapped_in) == 3 * (3 + 2), "seeds times lengths, of softmax and of MiTA"
    assert swapped_in < {c.case_id for c in suite_file.load("accuracy").expand()}


def test_models_that_are_pruned_are_trained_as_in_the_suite_of_accuracy() -> None:
    fields = ("data", "n", "seed", "batch", "steps", "rates", "depth", "positions", "short_conv", "heads", "dim", "dtype")
    pruned, earned = (
        {tuple(getattr(c, f) for f in fields) for c in suite_file.load(x).expand() if c.steps > 1} for x in ("pruning", "accuracy")
    )
    assert pruned < earned


def test_a_cell_that_never_learns_is_affordable() -> None:
    """Tokens that a cell reads at all its rates, at the 1.9e7 a second that models of softmax with two blocks take together on an H200."""
    for one in suite_file.load("accuracy").expand():
        tokens = one.steps * len(one.rates.split("/")) * one.batch * one.n
        assert tokens * one.depth / 2 / 1.9e7 <= 75, one


def again(command: str) -> set[str]:
    """Ids of the cases that the command of a record runs."""
    words = command.split()
    values = {
        option: [words[i + 1] for i, word in enumerate(words) if word == option] for option in ("--axis", "--set", "--method", "--budget")
    }
    axes = read_axes(values["--axis"]) | read_budget(next(iter(values["--budget"]), None))
    own = suite_file.load(words[2]).override(axes, values["--method"], read_settings(values["--set"]))
    return {c.case_id for c in own.expand()}


def test_the_command_line_trains_at_toy_size_and_resumes(tmp_path: Path) -> None:
    words = ["run", "accuracy", "--device", "cpu", "--results", tmp_path, "--method", "softmax", "--method", "mita", "--quiet"]
    for axis in ("data=mqar", "n=32", "batch=4", "dim=4", "steps=3", "depth=1", "seed=0", "rates=1e-3", "budget=8", "dtype=float32"):
        words += ["--axis", axis]
    first = call(*words)
    assert first.exit_code == 0, first.stderr
    assert "5 ok, 3 unsupported" in first.stderr
    assert "8 settled before" in call(*words, "--resume").stderr
    folder = next((tmp_path / "accuracy").glob("*/records.jsonl"))
    records = store.read(folder).records
    assert {r.status for r in records} == {Status.OK, Status.UNSUPPORTED}
    trained_ones = [record for record in records if record.training]
    assert len(trained_ones) == 5
    for record in trained_ones:
        assert again(record.command) == {record.case.case_id}
