"""Top-k attention in chunks of queries: the N x M scores never exist, and only the chosen indices are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.eager import attend, wide

from ._chunks import attend_backward, rows_per_chunk, zeros_wide
from .topk import choose

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .topk import TopkParams


def chunked(q: Tensor, k: Tensor, v: Tensor, params: TopkParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory O(N K) indices and one chunk of scores."""
    out: Tensor = _Topk.apply(q, k, v, params)  # type: ignore[no-untyped-call]
    return out


class _Topk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, params: TopkParams) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        index = _select(q, k, params)
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for rows in _chunks(q, _gather_bytes(q, v, index)):
            query, keys, values, mask = _gathered(q, k, v, index, rows)
            out[:, :, rows] = attend(query, keys, values, q.shape[-1] ** -0.5, mask).squeeze(3)
        ctx.save_for_backward(q, k, v, index)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, index = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), zeros_wide(k), zeros_wide(v)
        for rows in _chunks(q, 2 * _gather_bytes(q, v, index)):
            query, keys, values, mask = _gathered(q, k, v, index, rows)
            parts = attend_backward(grad[:, :, rows].unsqueeze(3), query, keys, values, scale=q.shape[-1] ** -0.5, mask=mask)
            dq[:, :, rows] = parts[0].squeeze(3)
            places = _places(index[:, :, rows], k)
            dk.flatten(0, 2).index_add_(0, places, parts[1].flatten(0, 3).to(dk.dtype))
            dv.flatten(0, 2).index_add_(0, places, parts[2].flatten(0, 3).to(dv.dtype))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _select(q: Tensor, k: Tensor, params: TopkParams) -> Tensor:
    """Chosen keys `[B, H, N, K]` as int32, -1 where a causal query sees fewer than K."""
    index = torch.full((*q.shape[:3], min(params.topk, k.shape[2])), -1, dtype=torch.int32, device=q.device)
    fused = q.is_cuda and q.element_size() == 2 and hasattr(torch.ops.aten.bmm, "dtype")
    keys = k if fused else wide(k)
    score_bytes = 3 * q.shape[0] * q.shape[1] * k.shape[2] * wide(q[..., :0]).element_size()  # scores, masked copy, workspace
    for rows in _chunks(q, score_bytes):
        visible = min(rows.stop, k.shape[2]) if params.causal else k.shape[2]
        scores = _scores(q[:, :, rows], keys[:, :, :visible], fused)
        chosen = choose(scores, torch.arange(rows.start, rows.stop, device=q.device), params)
        index[:, :, rows, : chosen.shape[-1]] = chosen.to(torch.int32)
    return index


def _scores(q: Tensor, k: Tensor, fused: bool) -> Tensor:
    """`q k^T` `[B, H, R, M]` in at least float32, the heads of a group stacked so that k need not be repeated."""
    b, h, r, d = q.shape
    left = (q if fused else wide(q)).reshape(b * k.shape[1], -1, d)
    right = k.flatten(0, 1).transpose(1, 2)
    scores = torch.bmm(left, right, out_dtype=torch.float32) if fused else left @ right
    return scores.view(b, h, r, -1)


def _gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query `[B, H, R, 1, D]`, its keys `[B, H, R, K, D]` and values `[B, H, R, K, Dv]`, and which of them are there."""
    chosen = index[:, :, rows]
    places = _places(chosen, k)
    keys, values = (x.flatten(0, 2).index_select(0, places).view(*chosen.shape, x.shape[3]) for x in (k, v))
    return q[:, :, rows].unsqueeze(3), keys, values, (chosen >= 0).unsqueeze(3)


def _places(chosen: Tensor, k: Tensor) -> Tensor:
    """Rows of `k` flattened to `[B Hkv M, D]` that `chosen: [B, H, R, K]` means; an absent key stands at row 0 of its head."""
    b, h = chosen.shape[:2]
    head = torch.arange(b * h, device=k.device).view(b, h, 1, 1) // (h // k.shape[1])
    return (head * k.shape[2] + chosen.clamp(min=0)).flatten()


def _gather_bytes(q: Tensor, v: Tensor, index: Tensor) -> int:
    """Bytes of a query's gathered keys, values and scores."""
    return 2 * q.shape[0] * q.shape[1] * index.shape[-1] * (q.shape[-1] + v.shape[-1]) * q.element_size()


def _chunks(q: Tensor, bytes_per_row: int) -> Iterator[slice]:
    step = rows_per_chunk(q, bytes_per_row)
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))
