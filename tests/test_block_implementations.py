"""Block windows, BRA and NSA: fast weights, practical implementations, what backward keeps, and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_support import IDS, PRACTICAL, SETTINGS, SMALL, close, settled, stirred, tensors
from torch import Tensor

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.inputs import draw
from attnbench.method import Shape

SIZES = [(1, 4), (35, 2), (63, 1), (100, 2)]


@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=IDS)
def test_fast_weights_are_the_definition(name: str, values: dict[str, Any], n: int, kv_heads: int) -> None:
    method, qkv = attnbench.get(name), tensors(n, kv_heads)
    params = settled(method, values, qkv)
    own = {"weights": x} if (x := stirred(method, params, qkv)) else {}
    close(fastweights.apply(method.experts(*qkv, params, **own), qkv[0]), method.reference(*qkv, params, **own))  # type: ignore[misc]


@pytest.fixture(params=[1 << 26, 1 << 13], ids=["roomy", "tight"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": request.param})


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize(("n", "kv_heads"), SIZES)
@pytest.mark.parametrize(("name", "values"), SETTINGS, ids=IDS)
def test_practical_implementation_is_the_definition(name: str, values: dict[str, Any], n: int, kv_heads: int) -> None:
    method, qkv = attnbench.get(name), tensors(n, kv_heads)
    params = settled(method, values, qkv)
    own = stirred(method, params, qkv)
    leaves = [x.requires_grad_() for x in (*qkv, *own.values())]
    named = dict(zip(own, leaves[3:], strict=True))
    got = method.run(method.implementation(PRACTICAL[name]), *leaves[:3], params, weights=named)
    want = method.reference(*leaves[:3], params, weights=named)
    close(got, want)
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(5))
    pairs = [torch.autograd.grad(out, leaves, grad, allow_unused=True) for out in (got, want)]
    for mine, theirs in zip(*pairs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PRACTICAL)
def test_backward_keeps_no_pairs(name: str) -> None:
    """What autograd saves grows with N, not with N x N."""
    method, saved = attnbench.get(f"{name}@{PRACTICAL[name]}"), []
    values: dict[str, Any] = {"nsa": SMALL | {"window": 8}}.get(name, {})
    for n in (256, 1024):
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        qkv = [x.requires_grad_() for x in tensors(n)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = method(*qkv, **values)
        saved.append(sum(sizes.values()))
        out.sum().backward()
    assert saved[1] < 4.5 * saved[0]


@pytest.mark.parametrize("profile", ["randn", "needle"])
@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("block_window@sdpa", {}), ("block_window@sdpa", {"bias": True}), ("block_window@sdpa", {"grid": "line", "causal": True}),
        ("bra@varlen", {"region": 16}), ("bra@varlen", {"region": 16, "lepe": 3, "scale": "1/sqrt(d)"}),
        ("nsa@varlen", {"topk": 4, "window": 33}), ("nsa@varlen", {"topk": 4, "window": 33, "causal": True}),
        ("nsa@varlen", {"topk": 4, "phi": "mlp"}),
        ("moba@varlen", {"block": 32}), ("moba@varlen", {"block": 32, "causal": True}),
    ],
    ids=str,
)  # fmt: skip
def test_half_precision_passes_the_gate(label: str, values: dict[str, Any], profile: str) -> None:
    method, shape = attnbench.get(label), Shape(1, 2, 330, 16)
    params = method.parse(values).fitted(shape)
    inputs = draw(profile, shape, 1, torch.bfloat16, "cpu")
    result = gate(method, method.implementation(method.pinned), params, inputs, backward=True)
    assert result.passed, {k: (v, result.bounds[k]) for k, v in result.errors.items() if v > result.bounds[k]}
