"""MiTA against a loop over queries that shares no code with it."""

import itertools
import math
from typing import Any

import pytest
import torch
from attnbench.methods import _segments
from attnbench.methods._varlen import group_by_expert, make_part, merged_attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attnbench
from attnbench.eager import attend
from attnbench.errors import UserError
from attnbench.fastweights import apply
from attnbench.inputs import draw
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


def two_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Experts 0 to 3 with 2, 3, 4 and 1 keys, expert 1 unused; causal segments of rows 0-4 and 5-9; rows 10 and 11 read nothing."""
    order, counts = group_by_expert(IDS, 4)
    routed = make_part(order, counts, k, v, WIDTHS)
    lengths = torch.tensor([5, 0, 5])
    causal = make_part(torch.arange(10), lengths, k2, v2, lengths, causal=True)
    return merged_attention(q, [routed, causal], [0.5, 0.7])


IDS = torch.tensor([0, 3, 2, 2, 4, 0, 4, 3, 2, 0, 4, 4])
WIDTHS = torch.tensor([2, 3, 4, 1])


def two_parts_dense(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    expert = torch.arange(4).repeat_interleave(WIDTHS)
    row, past = torch.arange(12)[:, None], torch.arange(10)
    mask = torch.cat([IDS[:, None] == expert, (past <= row) & (past // 5 == row // 5)], 1)
    logits = torch.cat([0.5 * q @ k.T, 0.7 * q @ k2.T], 1).masked_fill(~mask, -1e300)
    return (logits.softmax(-1) * mask) @ torch.cat([v, v2])


@pytest.mark.parametrize("merged_at_once", [5, 12])
def test_parts_with_unused_experts_and_idle_rows_merge_to_one_softmax(merged_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.methods._slots._MERGE_ROWS", merged_at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 4), (10, 4), (10, 3), (10, 4), (10, 3)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    got, want = two_parts(*inputs), two_parts_dense(*inputs)
    torch.testing.assert_close(got, want)
    assert (got[10:] == 0).all()
    grad = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(two_parts, inputs)


def test_a_part_without_queries_adds_nothing() -> None:
    q, k, v = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    none, three = torch.tensor([0]), torch.tensor([3])
    idle, busy = (make_part(torch.arange(3), count, k, v, three) for count in (none, three))
    out = merged_attention(q, [idle, busy], 0.5)
    torch.testing.assert_close(out, attend(q[None, None], k[None, None], v[None, None], 0.5)[0, 0])
    assert torch.autograd.grad(out.square().sum(), k)[0].isfinite().all()


def test_rows_are_grouped_in_order() -> None:
    order, counts = group_by_expert(IDS, 4)
    assert counts.tolist() == [3, 0, 3, 2]
    assert order.tolist() == [0, 5, 9, 2, 3, 8, 1, 7, 4, 6, 10, 11]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 40, 36])
@pytest.mark.parametrize("values", [{}, {"experts_per_query": 2}, {"shared": False}, {"routed": False}])
def test_flash_attention_over_segments_agrees_with_the_definition(values: dict[str, Any], dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 777, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    grad = torch.randn_like(v)
    exact, half = ([x.to(t).requires_grad_() for x in (q, k, v)] for t in (torch.float64, torch.bfloat16))
    # the definition on the same landmarks and experts: rounded queries average to other landmarks, so compare the rows that agree
    want, eager, got = (attnbench.get(f"mita@{name}")(*x, **values) for name, x in (("eager", exact), ("eager", half), ("varlen", half)))
    worst, ours = (((x.double() - want).norm(dim=-1) / want.norm(dim=-1)).flatten().quantile(0.9) for x in (eager, got))
    assert ours < 2 * worst + 1e-3
    theirs, mine, truth = (
        torch.autograd.grad(out, x, grad.to(out.dtype), allow_unused=True) for out, x in ((eager, half), (got, half), (want, exact))
    )
    for a, b, c in zip(mine, theirs, truth, strict=True):
        error, bound = (((x.double() - c).norm(dim=-1) / c.norm(dim=-1).clamp(min=1e-3)).flatten().quantile(0.9) for x in (a, b))
        assert error < 3 * bound + 1e-3


@pytest.mark.parametrize("name", ["mita", "bra"])
def test_rounded_outputs_leave_small_gradients_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where flash attention rounds the outputs from which gradients take differences: here the loop does."""
    forward, shape = _segments._loop_forward, Shape(1, 2, 1024, 64)

    def rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: _segments.Layout) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(q, k, v, layout)
        return out.to(q.dtype), lse

    monkeypatch.setattr(_segments, "_loop_forward", rounding)
    monkeypatch.setattr(_segments, "kept_dtype", lambda q: q.dtype)
    method, qkv = attnbench.get(name), [x.requires_grad_() for x in draw("clustered", shape, 0, torch.bfloat16, "cpu")]
    params = method.parse({"scale": "1/sqrt(d)", "topk": 2} if name == "bra" else {})
    exact = [x.detach().double().requires_grad_() for x in qkv]
    grad = torch.randn(qkv[2].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    want = torch.autograd.grad(method.reference(*exact, params), exact[0], grad.double())[0]
    worst = []
    for mends in (_segments.lacks, lambda _out, _q: False):
        monkeypatch.setattr(_segments, "lacks", mends)
        out = method.run(method.implementation("varlen"), *qkv, params)
        errors = (torch.autograd.grad(out, qkv[0], grad)[0].double() - want).norm(dim=-1)
        worst.append(float(errors.quantile(0.95)))
    assert worst[0] < worst[1] / 2, worst
