"""`attnbench check` holds a method to its whole contract: a wrong method for each part of it, told by its line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cli_support import call

import attnbench
from attnbench import registry
from attnbench.contract import parts
from attnbench.method import Cost, Limits, Method
from attnbench.plausible import least
from attnbench.taxonomy import Count

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from attnbench.fastweights import FastWeights
    from attnbench.method import Params, Shape

SOFTMAX = attnbench.get("softmax")
BUILT = SOFTMAX.experts
assert BUILT is not None

PLUGIN = """
from dataclasses import replace
from attnbench.methods.softmax import METHOD as SOFTMAX

def experts(q, k, v, params):
    weights = SOFTMAX.experts(q, k, v, params)
    bank = weights.banks[0]
    return replace(weights, banks=(replace(bank, index=bank.index[..., ::2]),))

METHOD = replace(SOFTMAX, name="halved", experts=experts, implementations=())
"""


def silent(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    raise RuntimeError("of its own making\nand more")


def earlier(q: Tensor, k: Tensor, v: Tensor, params: Params, rows: Tensor | None = None) -> Tensor:
    """Full attention, said to be causal."""
    return SOFTMAX.reference(q, k, v, replace(params, causal=False), rows)


def mixed(q: Tensor, k: Tensor, v: Tensor, params: Params, rows: Tensor | None = None) -> Tensor:
    """All heads have the mean of the heads' outputs."""
    return SOFTMAX.reference(q, k, v, params, rows).mean(1, keepdim=True).expand(-1, q.shape[1], -1, -1)


def from_the_front(q: Tensor, k: Tensor, v: Tensor, params: Params, rows: Tensor | None = None) -> Tensor:
    """The first rows, whichever are asked for."""
    return SOFTMAX.reference(q, k, v, params, None if rows is None else torch.arange(len(rows)))


def counted(shape: Shape, params: Params, **changed: Any) -> Cost:
    return replace(SOFTMAX.cost(shape, params), **changed)


def costs(**stages: Any) -> Method:
    """Softmax with some stages counted otherwise: by a number, or by a function of the shape."""

    def cost(shape: Shape, params: Params) -> Cost:
        own = {name: n(shape) if callable(n) else n for name, n in stages.items()}
        return counted(shape, params, flops={**SOFTMAX.cost(shape, params).flops, **own})

    return replace(SOFTMAX, cost=cost)


@pytest.mark.parametrize(
    ("wrong", "part", "what"),
    [
        (replace(SOFTMAX, title=""), "declaration", "no title"),
        (replace(SOFTMAX, reference=from_the_front), "reference", "rows of the whole"),
        (replace(SOFTMAX, reference=mixed), "reference", "softmax attention, which exact says it is"),
        (replace(SOFTMAX, reference=mixed), "heads", "heads apart"),
        (replace(SOFTMAX, couples_heads=True), "heads", "couples_heads is declared, but no head sees another"),
        (replace(SOFTMAX, reference=earlier), "causality", "earlier outputs when later tokens change"),
        (replace(SOFTMAX, experts=None), "experts", "neither experts nor no_experts: give experts(q, k, v, params), or say in no_experts"),
        (replace(SOFTMAX, no_experts="for no reason"), "experts", "both experts and no_experts ('for no reason') are given"),
        (replace(SOFTMAX, experts=silent), "experts", "RuntimeError: of its own making"),
        (
            replace(SOFTMAX, coordinates=replace(SOFTMAX.coordinates, count=Count.TOKENS)),
            "coordinates",
            "count: declared N, measured one shared (nothing is routed)",
        ),
        (costs(score=7), "cost", "fewer than 8355840, which scoring and summing them takes"),
        (costs(score=7), "cost", "stage 'score': 7 FLOPs, and 7 for twice the batch"),
        (costs(attend=7), "cost", "attend: 7 FLOPs, fewer than 4177920, which summing the hidden units takes that a query reads"),
        (costs(route=lambda s: 7 * s.batch), "cost", "stage 'route': 7 FLOPs, and 7 for twice the heads and four times the tokens"),
        (costs(mixing=1), "cost", "'mixing' is no stage: choose from project"),
        (costs(score=float("nan")), "cost", "stage 'score' counts nan FLOPs: give whole numbers of at least 0"),
        (costs(score=lambda s: s.batch * s.n**3), "cost", "FLOPs grow as N^3, not between N and N^2"),
        (replace(SOFTMAX, cost=lambda s, p: counted(s, p, elements=s.batch)), "cost", "4 bytes, fewer than 65536, which the queries"),
    ],
)  # fmt: skip
def test_a_wrong_method_fails_in_its_own_line(monkeypatch: pytest.MonkeyPatch, wrong: Method, part: str, what: str) -> None:
    monkeypatch.setitem(registry.registry().found, "softmax", wrong)
    found = [each.run("cpu") for each in parts(wrong) if each.name == part]
    assert "failed" in {f.verdict for f in found}
    assert any(what in f.what for f in found if f.verdict == "failed"), found
    assert all(f.error > f.bound for f in found if f.verdict == "failed" and f.error is not None and f.bound is not None)


def test_check_tells_of_a_plugins_experts_beside_its_implementations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.registry()
    copy = registry.Registry(dict(known.found), {}, dict(known.sources))
    monkeypatch.setattr(registry, "registry", lambda: copy)
    (tmp_path / "halved.py").write_text(f'"""Half of the keys."""\n{PLUGIN}')
    result = call("check", "halved", "--plugin", tmp_path / "halved.py", "--device", "cpu", "--json")
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {r["mode"] for r in rows if r["verdict"] == "failed"} == {"experts", "causal experts", "coordinates"}
    assert all(r["error"] > 0.1 and r["what"] == "fast weights" for r in rows if r["mode"] == "experts")
    assert {r["implementation"] for r in rows} == {"halved", "halved@eager"}
    assert len({tuple(r) for r in rows}) == 1, "rows of one form"
    alone = json.loads(call("check", "halved@eager", "--device", "cpu", "--json").stdout)
    assert {r["implementation"] for r in alone} == {"halved@eager"}


def test_limits_that_raise_fail_every_row_and_stop_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> list[str]:
        raise RuntimeError("of its own making")

    wrong = replace(SOFTMAX, limits=Limits(extra=raises), implementations=())
    monkeypatch.setitem(registry.registry().found, "softmax", wrong)
    rows = json.loads(call("check", "softmax", "--device", "cpu", "--json").stdout)
    assert {(r["verdict"], r["what"]) for r in rows} == {("failed", "RuntimeError: of its own making")}
    assert {r["implementation"] for r in rows} == {"softmax", "softmax@eager"}


def test_a_reason_for_no_experts_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = replace(SOFTMAX, experts=None, no_experts="its experts are learned while it runs", limits=Limits(no_causal="by choice"))
    monkeypatch.setitem(registry.registry().found, "softmax", honest)
    found = {f.mode: f for f in (part.run("cpu") for part in parts(honest))}
    reason = "no fast weights: its experts are learned while it runs"
    assert {name: f.what for name, f in found.items() if f.verdict == "unsupported"} == {
        "experts": reason,
        "coordinates": reason,
        "causality": "no causal form: by choice",
    }
    assert not [f for f in found.values() if f.verdict == "failed"]


def test_the_least_work_is_counted_in_the_units_that_are_read() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    whole, half = (BUILT(q, k, v, SOFTMAX.params(causal=causal)) for causal in (False, True))
    assert least(whole, q) == (2 * 8 * 7 * 4, 2 * 8 * 7 * 4)
    assert least(half, q) == (2 * 28 * 4, 2 * 28 * 4)
    kernel = attnbench.get("linear")
    assert kernel.experts is not None
    assert least(kernel.experts(q, k, v, kernel.params()), q) == (0, 2 * 8 * 3 * 4)
    assert least(kernel.experts(q, k, v, kernel.params(causal=True)), q) == (0, 2 * (0 + 1 + 2 + 5 * 3) * 4)
