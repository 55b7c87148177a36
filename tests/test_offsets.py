"""Deformable attention and DAT alike: implementations, where they look, widths, half precision, costs and refusals."""

from __future__ import annotations

import pytest
import torch
from method_support import close
from offset_support import CASES, PRACTICAL, make, practical
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench import fastweights
from attnbench.check import gate
from attnbench.errors import UserError
from attnbench.method import Shape


@pytest.fixture(params=["roomy", "tight"])
def budget(request, monkeypatch):
    if request.param == "tight":
        monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 13, "cuda": 1 << 13})
        monkeypatch.setattr("attnbench.methods._dat._RUN", 9)


@pytest.mark.parametrize(("name", "setting"), CASES)
@pytest.mark.usefixtures("budget")
def test_practical_implementations_are_the_definition_with_gradients(name, setting):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 63, 2)
    results = []
    for run in (method.reference, practical(method)):
        leaves = [x.clone().requires_grad_() for x in (*qkv, *own.values())]
        out = run(*leaves[:3], params, weights=dict(zip(own, leaves[3:], strict=True)))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize(("name", "setting"), [("deformable", {"points": 2}), ("dat", {"points": 4}), ("dat", {"stride": 3, "reach": 1.0})])
def test_tokens_that_no_point_lies_beside_are_not_read(name, setting):
    method, row = attnbench.get(name), 17
    (q, k, v), params, own = make(method, setting, 36)
    one = torch.eye(36, dtype=torch.float64).expand(2, 4, -1, -1)
    read = method.reference(q, k, one, params, weights=own)[:, :, row]  # what each token weighs in the output of one query
    before = method.reference(q, k, v, params, weights=own)[:, :, row]
    close(before, (read.unsqueeze(-2) @ v).squeeze(-2))
    apart = read == 0
    assert 0 < apart.sum() < apart.numel()
    other_k, other_v = (torch.where(apart.unsqueeze(-1), x + 3, x) for x in (k, v))
    close(practical(method)(q, other_k, other_v, params, own)[:, :, row], before)


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_tokens_have_places(name, setting):
    method = attnbench.get(name)
    (q, k, v), params, own = make(method, setting, 63)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(4))
    permuted = method.reference(*(x[:, :, order] for x in (q, k, v)), params, weights=own)
    assert not torch.allclose(permuted, method.reference(q, k, v, params, weights=own)[:, :, order])


@pytest.mark.parametrize(
    ("name", "setting", "width"), [("deformable", {"points": 3}, 3), ("dat", {"points": 9}, 9), ("dat", {"stride": 2}, 9)]
)
def test_width_is_the_number_of_points(name, setting, width):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 36)
    assert fastweights.width_per_query(method.experts(*qkv, params, weights=own)) == width
    assert method.budget(Shape.of(*qkv), params, 7)["points"] == 7


@pytest.mark.parametrize("moved", [0.0, 0.1])
@pytest.mark.parametrize(("name", "setting"), [*CASES[:4], CASES[7]])
def test_half_precision_passes_the_gate(name, setting, moved):
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 240, 2, heads=2, dim=32, dim_v=32, dtype=torch.bfloat16, moved=moved)
    result = gate(method, method.implementation(PRACTICAL[name]), params, tuple(qkv), own, backward=True)
    assert result.passed, {x: (e, result.bounds[x]) for x, e in result.errors.items() if e > result.bounds[x]}
    assert set(result.errors) >= {"out rms", "dq rms", "dv max", "doffset_weight rms"}


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_costs_of_matrix_products_are_what_torch_counts(name, setting):
    """Sampling and the convolution multiply entry by entry, which torch does not count."""
    method = attnbench.get(name)
    qkv, params, own = make(method, setting, 63, 2)
    flops = dict(method.cost(Shape.of(*qkv), params).flops)
    if name == "dat":
        rows, columns = params.counts(63)
        flops["project"] -= 2 * 2 * 4 * rows * columns * 6 * params.strides(63)[1] ** 2
        flops["score"] -= 8 * 2 * 4 * rows * columns * 63 if params.bias else 0
    with FlopCounterMode(display=False) as counter:
        method.reference(*qkv, params, weights=own)
    assert counter.get_total_flops() == flops["project"] + flops.get("score", 0) + flops["attend"]
    points = rows * columns if name == "dat" else 63 * params.points
    assert flops["gather"] == 2 * 4 * points * 4 * 2 * (5 + (6 if name == "dat" else 0))


@pytest.mark.parametrize(
    ("name", "setting"), [("deformable", {"points": 2}), ("dat", {"points": 16}), ("dat", {"points": 16, "bias": True})]
)
def test_backward_keeps_what_grows_with_the_tokens_alone(name, setting, monkeypatch):
    monkeypatch.setattr("attnbench.methods._chunks._BUDGET_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})
    method, saved = attnbench.get(f"{name}@{PRACTICAL[name]}"), []
    for n in (1024, 4096):
        sizes, qkv = {}, [torch.randn(1, 2, n, 16).requires_grad_() for _ in range(3)]

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = method(*qkv, **setting)
        saved.append(sum(sizes.values()))
        assert saved[-1] < 7 * qkv[0].numel() * 4
        out.sum().backward()
    assert saved[1] < 4.1 * saved[0]


def test_bad_input_is_one_line_that_says_what_to_do():
    q = torch.randn(1, 3, 12, 4)
    cases = [
        ("deformable", {"points": 0}, "points = 0 is below its least value 1"),
        ("deformable", {"grid": "2x5"}, "grid = 2x5 holds 10 tokens, not N = 12: change grid or N"),
        ("deformable", {"causal": True}, "no causal form: a query looks to all sides of itself"),
        ("dat", {}, "group_heads = 2 does not divide the 3 heads: change group_heads"),
        ("dat", {"group_heads": 3, "stride": 5, "kernel": 5}, "does not fit the grid"),
        ("dat", {"group_heads": 3, "release": "2024"}, "unknown value of dat.release '2024'"),
        ("dat", {"group_heads": 3, "causal": True}, "no causal form: all queries together say where points lie"),
    ]
    for name, setting, message in cases:
        with pytest.raises(UserError, match=message):
            attnbench.get(name)(q, q, q, **setting)
