"""Attention over segments of rows: parts merge to one softmax, on a GPU too, and rounded outputs keep small gradients."""

from typing import Any

import pytest
import torch
from attnbench.methods import _segments
from attnbench.methods._varlen import group_by_expert, make_part, merged_attention
from torch import Tensor

import attnbench
from attnbench.eager import attend
from attnbench.inputs import draw
from attnbench.method import Shape


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
