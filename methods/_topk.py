"""Attention to chosen keys in chunks of queries: N x M scores never exist, and only the chosen indices are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.eager import attend, wide
from attnbench.stages import stage

from ._chunks import attend_backward, row_chunks, wide_scores, zeros_wide
from .topk import choose

if TYPE_CHECKING:
    from .topk import TopkParams


def chunked(q: Tensor, k: Tensor, v: Tensor, params: TopkParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory O(N K) indices and one chunk of scores."""
    return attend_chosen(q, k, v, select(q, k, params))


def fused(q: Tensor, k: Tensor, v: Tensor, params: TopkParams) -> Tensor:
    """The same by `attnbench.kernels`: one kernel scores and one selects, for a slab of queries at a time, and one attends."""
    from attnbench.kernels.gather import gather_attention
    from attnbench.kernels.topk import select_topk

    return gather_attention(q, k, v, select_topk(q, k, params.topk, causal=params.causal))


@torch.no_grad()
def select(q: Tensor, k: Tensor, params: TopkParams) -> Tensor:
    """Keys `[B, H, N, K]` as int32 with the largest `q . k`, -1 where a causal query sees fewer than K."""
    index = torch.full((*q.shape[:3], min(params.topk, k.shape[2])), -1, dtype=torch.int32, device=q.device)
    keys = k if q.is_cuda else wide(k)
    score_bytes = 3 * q.shape[0] * q.shape[1] * k.shape[2] * wide(q[..., :0]).element_size()  # scores, masked copy, workspace
    for rows in row_chunks(q, score_bytes):
        visible = min(rows.stop, k.shape[2]) if params.causal else k.shape[2]
        with stage("score"):
            scores = wide_scores(q[:, :, rows], keys[:, :, :visible])
        with stage("select"):
            chosen = choose(scores, torch.arange(rows.start, rows.stop, device=q.device), params)
            index[:, :, rows, : chosen.shape[-1]] = chosen.to(torch.int32)
    return index


def attend_chosen(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Each query of `q: [B, H, N, D]` attends to the keys `index: [B, H or 1, N, K]`, -1 for none -> `[B, H, N, Dv]`."""
    out: Tensor = _Chosen.apply(q, k, v, index)  # type: ignore[no-untyped-call]
    return out


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for rows in row_chunks(q, _gather_bytes(q, v, index)):
            query, keys, values, mask = _gathered(q, k, v, index, rows)
            with stage("attend"):
                out[:, :, rows] = attend(query, keys, values, q.shape[-1] ** -0.5, mask).squeeze(3)
        ctx.save_for_backward(q, k, v, index)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, index = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), zeros_wide(k), zeros_wide(v)
        for rows in row_chunks(q, 2 * _gather_bytes(q, v, index)):
            query, keys, values, mask = _gathered(q, k, v, index, rows)
            parts = attend_backward(grad[:, :, rows].unsqueeze(3), query, keys, values, scale=q.shape[-1] ** -0.5, mask=mask)
            dq[:, :, rows] = parts[0].squeeze(3)
            places = _places(index[:, :, rows], q, k)
            dk.flatten(0, 2).index_add_(0, places, parts[1].flatten(0, 3).to(dk.dtype))
            dv.flatten(0, 2).index_add_(0, places, parts[2].flatten(0, 3).to(dv.dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query `[B, H, R, 1, D]`, its keys `[B, H, R, K, D]` and values `[B, H, R, K, Dv]`, and which of them are there."""
    with stage("gather"):
        chosen, query = index[:, :, rows], q[:, :, rows].unsqueeze(3)
        places = _places(chosen, q, k)
        keys, values = (x.flatten(0, 2).index_select(0, places).view(*query.shape[:3], chosen.shape[-1], x.shape[3]) for x in (k, v))
        return query, keys, values, (chosen >= 0).unsqueeze(3)


def _places(chosen: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Rows of `k` flattened to `[B Hkv M, D]` that `chosen: [B, H or 1, R, K]` means; an absent key stands at row 0 of its head."""
    b, h = q.shape[:2]
    head = torch.arange(b * h, device=k.device).view(b, h, 1, 1) // (h // k.shape[1])
    return (head * k.shape[2] + chosen.clamp(min=0)).flatten()


def _gather_bytes(q: Tensor, v: Tensor, index: Tensor) -> int:
    """Bytes of a query's gathered keys, values and scores."""
    return 2 * q.shape[0] * q.shape[1] * index.shape[-1] * (q.shape[-1] + v.shape[-1]) * q.element_size()
