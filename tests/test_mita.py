"""MiTA against a loop over queries that shares no code with it."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.eager import attend
from attnbench.errors import UserError
from attnbench.fastweights import apply
from attnbench.method import Params, Shape

MITA = attnbench.get("mita")
SIZES = [
    (29, {"landmarks": 6, "topk": 7}),
    (29, {"landmarks": 6, "topk": 7, "experts_per_query": 2}),
    (29, {"landmarks": 6, "topk": 7, "experts_per_query": 6, "prefix": 4}),
    (31, {"landmarks": 4, "topk": 11, "grid": "5x6", "prefix": 1}),
    (50, {"landmarks": 9, "topk": 8, "grid": "square", "prefix": 1, "legacy_cls_shift": True}),
    (23, {"landmarks": 5, "topk": 3, "routed": False}),
    (23, {"landmarks": 5, "topk": 3, "shared": False}),
    (23, {"landmarks": 5, "topk": 3, "shared": False, "experts_per_query": 2}),
    (23, {"landmarks": 5, "topk": 4, "shared_scale": "1/sqrt(d)"}),
    (1, {"landmarks": 1, "topk": 1}),
]


def tensors(n: int, dim: int = 4, dim_v: int = 3, heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    widths = (dim, dim, dim_v)
    return [torch.randn(2, heads, n, w, generator=generator, dtype=dtype).requires_grad_() for w in widths]


def tokens_of_landmark(m: int, n: int, p: dict[str, Any]) -> list[int]:
    prefix = p.get("prefix", 0)
    first, count = (0 if p.get("legacy_cls_shift") else prefix), n - prefix
    if "grid" not in p:
        return [first + t for t in range(m * count // p["landmarks"], math.ceil((m + 1) * count / p["landmarks"]))]
    height, width = (math.isqrt(count),) * 2 if p["grid"] == "square" else map(int, p["grid"].split("x"))
    side = math.isqrt(p["landmarks"])
    row, column = divmod(m, side)
    ys = range(math.floor(row * height / side), math.ceil((row + 1) * height / side))
    xs = range(math.floor(column * width / side), math.ceil((column + 1) * width / side))
    return [first + y * width + x for y, x in itertools.product(ys, xs)]


def brute_force(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Any]) -> Tensor:
    """One query of one head at a time."""
    n, dim = q.shape[2:]
    c, count = dim**-0.5, p["landmarks"]
    factor = c if p.get("shared_scale") == "1/sqrt(d)" else 1 / dim
    out = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        Q, K, V = q[b, h], k[b, h], v[b, h]
        r = [torch.stack([Q[t] for t in tokens_of_landmark(m, n, p)]).mean(0) for m in range(count)]
        values = [sum(w * x for w, x in zip(torch.softmax(c * (K @ x), 0), V, strict=True)) for x in r]
        chosen = [sorted(range(len(K)), key=lambda j, x=x: -float((x @ K[j]).detach()))[: p["topk"]] for x in r]
        for i in range(n):
            best = sorted(range(count), key=lambda m: -float((r[m] @ Q[i]).detach()))[: p.get("experts_per_query", 1)]
            read = [(factor * (Q[i] @ x), u) for x, u in zip(r, values, strict=True)] if p.get("shared", True) else []
            if p.get("routed", True):
                read += [(c * (Q[i] @ K[j]), V[j]) for m in best for j in chosen[m]]
            weights = torch.softmax(torch.stack([logit for logit, _ in read]), 0)
            out.append(weights @ torch.stack([value for _, value in read]))
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parametrize(("n", "values"), SIZES)
@pytest.mark.parametrize("implementation", ["eager", "varlen"])
def test_output_and_gradients_are_those_of_a_loop(n: int, values: dict[str, Any], implementation: str) -> None:
    q, k, v = tensors(n)
    grad = torch.randn(2, 2, n, 3, dtype=torch.float64)
    method = attnbench.get(f"mita@{implementation}")
    got, want = method(q, k, v, **values), brute_force(q, k, v, values)
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad(got, (q, k, v), grad, allow_unused=True)
    for name, a, b in zip("qkv", got_grads, torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize(("n", "values"), SIZES)
def test_fast_weights_and_rows_agree_with_the_definition(n: int, values: dict[str, Any]) -> None:
    q, k, v = tensors(n)
    params = MITA.parse(values)
    want = MITA.reference(q, k, v, params)
    assert MITA.experts is not None
    weights = MITA.experts(q, k, v, params)
    torch.testing.assert_close(apply(weights, q), want)
    assert [bank.routes is None for bank in weights.banks] == [True] * values.get("shared", True) + [False] * values.get("routed", True)
    rows = torch.tensor([n - 1, 0, n // 2])
    torch.testing.assert_close(MITA.reference(q, k, v, params, rows), want[:, :, rows])


def test_more_queries_than_are_evaluated_at_once() -> None:
    q, k, v = (x[:1, :1] for x in tensors(2500))
    params = MITA.parse({"landmarks": 7, "topk": 5})
    whole = MITA.reference(q, k, v, params)
    torch.testing.assert_close(whole[:, :, 2000:], MITA.reference(q, k, v, params, torch.arange(2000, 2500)))


def test_route_only_with_all_keys_is_softmax_attention() -> None:
    q, k, v = tensors(19)
    got = MITA(q, k, v, landmarks=5, topk=19, shared=False)
    torch.testing.assert_close(got, attend(q, k, v, 0.5))


def test_compress_only_with_the_softmax_scale_is_agent_attention() -> None:
    q, k, v = tensors(19)
    got = MITA(q, k, v, landmarks=5, topk=1, routed=False, shared_scale="1/sqrt(d)")
    torch.testing.assert_close(got, attnbench.get("agent")(q, k, v, landmarks=5))


@pytest.mark.parametrize("implementation", ["eager", "varlen"])
def test_route_only_passes_no_gradient_through_landmarks(implementation: str) -> None:
    q, k, v = tensors(24)
    out = attnbench.get(f"mita@{implementation}")(q, k, v, landmarks=3, topk=5, shared=False)
    (dq,) = torch.autograd.grad(out[:, :, 7].sum(), q)
    assert dq[:, :, 7].abs().min() > 0
    assert dq.abs().sum() == dq[:, :, 7].abs().sum()
    out = attnbench.get(f"mita@{implementation}")(q, k, v, landmarks=3, topk=5)
    (dq,) = torch.autograd.grad(out[:, :, 7].sum(), q)
    assert dq[:, :, 20].abs().min() > 0


@pytest.mark.parametrize("implementation", ["eager", "varlen"])
def test_fewer_key_heads_and_other_numbers_of_keys(implementation: str) -> None:
    q, (_, k, v) = tensors(21, heads=4)[0], tensors(34)
    values = {"landmarks": 4, "topk": 9}
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
    got = attnbench.get(f"mita@{implementation}")(q, k, v, **values)
    torch.testing.assert_close(got, brute_force(q, wide_k, wide_v, values))


def test_all_queries_at_one_expert_leave_the_others_empty() -> None:
    q, k, v = tensors(20)
    with torch.no_grad():
        q[:, :, :] = q[:, :, :1] + torch.linspace(0, 1, 20, dtype=q.dtype)[:, None] * q[:, :, :1]
    values = {"landmarks": 5, "topk": 4}
    (got, want), grad = (attnbench.get(f"mita@{i}")(q, k, v, **values) for i in ("varlen", "eager")), torch.randn_like(v)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"topk": 17}, "topk = 17 exceeds"),
        ({"landmarks": 17}, "landmarks = 17 exceeds"),
        ({"landmarks": 2, "experts_per_query": 3}, "exceeds landmarks = 2"),
        ({"shared": False, "routed": False}, "read nothing"),
        ({"landmarks": 4, "grid": "square", "prefix": 1}, "square number"),
        ({"shared_scale": "2/d"}, "shared_scale"),
        ({"causal": True}, "no causal form"),
    ],
)
def test_values_that_make_no_sense_are_named(values: dict[str, Any], words: str) -> None:
    q, k, v = tensors(16)
    with pytest.raises(UserError, match=words) as error:
        MITA(q, k, v, **{"landmarks": 4, "topk": 4} | values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [1, 3, 24, 26])
def test_fitted_values_fit(n: int) -> None:
    shape = Shape(1, 1, n, 8, keys=max(1, n - 2))
    assert MITA.parse({"experts_per_query": 4}).fitted(shape).problems(shape) == []


@pytest.mark.parametrize(("n", "values"), SIZES)
def test_cost_counts_the_products_of_the_definition(n: int, values: dict[str, Any]) -> None:
    q, k, v = (x.detach() for x in tensors(n))
    params = MITA.parse(values)
    with FlopCounterMode(display=False) as counter:
        MITA.reference(q, k, v, params)
    cost = MITA.cost(Shape.of(q, k, v), params)
    assert cost.total() - cost.flops["pool"] == counter.get_total_flops()


def test_cost_is_the_published_formula() -> None:
    params = MITA.parse({"landmarks": 25, "topk": 30, "experts_per_query": 2})
    cost = MITA.cost(Shape(3, 6, 197, 64), params)
    assert cost.total() - cost.flops["pool"] == 3 * 6 * 2 * 197 * 64 * (4 * 25 + 2 * 2 * 30)


def varlen_reasons(shape: Shape, dtype: torch.dtype, device: str, params: Params) -> list[str]:
    return MITA.implementation("varlen").limits.reasons(shape, dtype, device, params)


def test_limits_of_variable_length_attention() -> None:
    params = MITA.parse({})
    assert varlen_reasons(Shape(1, 4, 64, 64), torch.bfloat16, "cuda", params) == []
    assert varlen_reasons(Shape(1, 4, 64, 64), torch.float32, "cpu", params) == []
    assert "not float32" in varlen_reasons(Shape(1, 4, 64, 64), torch.float32, "cuda", params)[0]
    assert "up to 256" in varlen_reasons(Shape(1, 4, 64, 512), torch.float16, "cuda", params)[0]
    assert "segments" in varlen_reasons(Shape(512, 16, 64, 64), torch.float16, "cuda", params)[0]
