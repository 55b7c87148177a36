"""The table of what each method reads, costs and gives up: counts of the cost models, times and errors of records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import synthetic
import torch
from cli_support import answer, call

import attnbench
from attnbench import frame, overview, suite_file
from attnbench.errors import UserError
from attnbench.method import Shape

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("softmax", "mita", "linear", "ttt", "topk")


def table(folder: Path) -> Any:
    """Made-up records of two suites: every time is 1 ms at 4096 tokens and 5 ms at 65536, every error 0.25, and what ran out of memory."""
    for name, n, methods in (("speed", 4096, NAMES), ("speed", 65536, NAMES), ("fidelity", 1024, ("softmax", "mita", "linear", "topk"))):
        chosen = suite_file.load(name).override({"n": [n]}, ["softmax@cudnn" if m == "softmax" else m for m in methods], {})
        records = [
            synthetic.failed(case, "oom")
            if case.method == "topk"
            else synthetic.ok(case, 5e-3 if n == 65536 else 1e-3, spread=0.0, metrics=metrics)
            for case in chosen.expand()
            for metrics in ([{"rel_error": 0.25}] if name == "fidelity" else [{}])
        ]
        synthetic.write(folder / str(n), name, records)
    return frame.load(folder)[0]


def rows(n: int, records: Any = None) -> tuple[dict[str, dict[str, str]], list[str]]:
    found, notes = overview.rows([attnbench.get(name) for name in NAMES], n, records)
    return {row["name"]: row for row in found}, notes


def test_counts_are_those_of_the_cost_model_with_the_parameters_of_the_suite() -> None:
    found, notes = rows(16384)
    assert {name: row["units read, N=4096"] for name, row in found.items()} == {
        "softmax": "all N", "mita": "128", "linear": "64", "ttt": "\N{EN DASH}", "topk": "64",
    }  # fmt: skip
    mita, shape = attnbench.get("mita"), Shape(1, 16, 16384, 64)
    cost = mita.cost(shape, mita.parse({"landmarks": 64, "topk": 64}))
    assert float(found["mita"]["GFLOP, N=16384"]) == pytest.approx(cost.total() / 1e9, rel=1e-2)
    assert float(found["mita"]["MB, N=16384"]) == pytest.approx(cost.bytes(torch.bfloat16.itemsize) / 1e6, rel=1e-2)
    assert found["mita"]["source"] == "Wen et al. 2026, https://arxiv.org/abs/2602.01219"
    assert notes == ["Forward, B=1, H=16, D=64, bfloat16, parameters of the suite speed."]


def test_short_sequences_are_read_with_parameters_that_fit() -> None:
    assert rows(32)[0]["topk"]["units read, N=32"] == "32"
    with pytest.raises(UserError, match="--n 0 must be at least 1"):
        rows(0)


def test_times_and_errors_are_of_the_same_parameters(tmp_path: Path) -> None:
    found, notes = rows(65536, table(tmp_path))
    assert {name: row["ms, N=65536"] for name, row in found.items()} == dict.fromkeys(NAMES, "5.00") | {"topk": "\N{EN DASH}"}
    errors = {name: [value for key, value in row.items() if key.startswith("error, ")] for name, row in found.items()}
    assert errors["mita"] == errors["softmax"] == ["0.25"] * 4
    assert errors["topk"] == errors["ttt"] == ["\N{EN DASH}"] * 4, "one failed, the other was not run"
    assert [note.split(":")[0] for note in notes[1:]] == ["Times", "Errors"]
    assert all(synthetic.DEVICE in note for note in notes[1:])
    assert {len(row) for row in found.values()} == {len(found["mita"])}, "one table"


def test_the_command_prints_it_in_every_form(tmp_path: Path) -> None:
    table(tmp_path)
    words = ("taxonomy", "--costs", "--n", 4096, "--scaling", "compression & routing", "--results", tmp_path, "--format")
    assert {row["name"]: row["ms, N=4096"] for row in answer(*words, "json")} == {"mita": "1.00", "nsa": "\N{EN DASH}"}
    done = call(*words, "markdown")
    assert done.stdout.splitlines()[0].startswith("| method | name | units read, N=4096 | GFLOP, N=4096 |")
    assert "parameters of the suite speed" in done.stderr
    assert call("taxonomy", "--costs", "--n", 0).exit_code == 2
