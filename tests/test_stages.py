"""Stages: one vocabulary, and every implementation marks its own in it."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch

import attnbench
from attnbench import inputs, stages, trace
from attnbench.method import Shape
from attnbench.stages import GRADIENT, STAGES, home, marking, rank, stage
from attnbench.trace import CALL, Event

ROOT = Path(attnbench.__file__).parent
METHODS = Path(importlib.import_module("attnbench.methods").__file__ or "").parent


def test_a_mark_does_nothing_until_a_breakdown_is_taken() -> None:
    assert isinstance(stage("attend"), contextlib.nullcontext)
    with marking():
        assert isinstance(stage("attend"), torch.profiler.record_function)
        assert isinstance(stage("attend gradient"), torch.profiler.record_function)
        with pytest.raises(ValueError, match="'atend' is no stage: choose from project, pool"):
            stage("atend")
    assert isinstance(stage("atend"), contextlib.nullcontext)
    with pytest.raises(RuntimeError), marking():
        raise RuntimeError
    assert isinstance(stage("attend"), contextlib.nullcontext), "marks end even where a call raises"


def test_marks_break_no_compiled_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with stage("pool"):
            x = x.cumsum(0)
            with stage("attend"):
                return x.exp()

    x = torch.randn(5)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def marks_in(path: Path) -> set[str]:
    """Names that a file marks."""
    calls = (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call))
    return {c.args[0].value for c in calls if getattr(c.func, "id", "") == "stage" and isinstance(c.args[0], ast.Constant)}


def test_every_mark_and_every_counted_stage_is_of_the_vocabulary() -> None:
    files = [*METHODS.rglob("*.py"), *(p for p in ROOT.rglob("*.py") if p.name != "stages.py")]
    marked = set().union(*map(marks_in, files))
    assert marked >= {"pool", "route", "permute", "attend", "merge", "compress", "invert"}
    assert {m for m in marked if not stages.known(m)} == set()
    for name in attnbench.methods():
        method, shape = attnbench.get(name), Shape(1, 2, 256, 64)
        cost = method.cost(shape, method.params().fitted(shape))
        for counted in cost.by_stage(2):
            assert stages.known(counted) or home(counted, STAGES) != "other", f"{name} counts {counted!r}, which is no stage"
        for implementation in method.implementations:
            assert all(map(stages.known, implementation.stages)), f"{name}@{implementation.name}"


def test_stages_come_in_the_order_of_a_call() -> None:
    names = ["other", "attend gradient", "backward", "attend", "pool gradient", "pool", "merge"]
    assert sorted(names, key=rank) == ["pool", "attend", "merge", "pool gradient", "attend gradient", "backward", "other"]


@pytest.mark.parametrize(
    ("counted", "measured", "want"),
    [
        ("score", ["score", "attend"], "score"),
        ("score", ["attend"], "attend"),
        ("score", ["pool"], "other"),
        ("probe", ["compress", "attend"], "compress"),
        ("compress", ["probe", "attend"], "probe"),
        ("read", ["state", "attend"], "attend"),
        ("compress gradient", ["probe gradient", "backward"], "probe gradient"),
        ("route gradient", ["attend gradient", "pool gradient"], "attend gradient"),
        ("attend gradient", ["attend", "backward"], "backward"),
        ("attend gradient", ["attend"], "other"),
    ],
)
def test_counted_work_goes_to_the_stage_that_does_it(counted: str, measured: list[str], want: str) -> None:
    assert home(counted, measured) == want


def practical() -> list[str]:
    """Implementations of all methods that run here, beside the definitions."""
    shape, found = Shape(1, 2, 64, 16), []
    for name in attnbench.methods():
        method = attnbench.get(name)
        params = method.params().fitted(shape)
        found += [f"{name}@{i.name}" for i in method.implementations if not method.reasons(i, shape, torch.float32, "cpu", params)]
    return found


@pytest.mark.parametrize("label", practical())
def test_every_implementation_says_what_it_does(label: str) -> None:
    method, shape = attnbench.get(label), Shape(1, 2, 64, 16)
    chosen, params = method.implementation(method.pinned), method.params().fitted(shape)
    tensors = inputs.draw("randn", shape, 0, torch.float32, "cpu")
    method.run(chosen, *tensors, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run, marking():
        method.run(chosen, *tensors, params)
    found = Counter(piece.stage for piece in trace.pieces(trace.read(run), chosen.stages, "cpu"))
    assert all(map(stages.known, found))
    assert found["other"] < found.total() / 2, f"most operators of {label} are in no stage: mark them with attnbench.stages.stage"


def launched() -> set[str]:
    """Kernels of the fused operator, by name."""
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "kernels" / "mita").glob("*.py")]
    functions = (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel"))
    return {f.name for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)}


def test_every_fused_kernel_has_a_stage() -> None:
    names = launched()
    assert len(names) >= 15
    for label in ("mita@triton", "agent@triton"):
        declared = attnbench.get(label).implementation("triton").stages
        for name in names:
            (piece,) = trace.pieces([Event(CALL, 0, 9), Event(name, 1, 2, on_device=True)], declared, "cuda")
            assert name in declared.get(piece.stage, ()), f"{name} belongs to no stage: add it to methods/_fused.py"
            assert "grad" not in name or piece.stage.endswith(GRADIENT)
