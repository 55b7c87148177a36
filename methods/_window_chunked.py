"""Sliding-window attention in blocks of queries: each block meets the keys that its windows cover, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.eager import attend, expand_heads, wide
from attnbench.stages import stage

from ._chunks import attend_backward, rows_per_chunk, zeros_wide
from .sliding_window import band

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .sliding_window import SlidingWindowParams

_LEAST_BLOCK = 64
"""queries in a block, at least, so that narrow windows still make sizeable matrix products"""


def chunked(q: Tensor, k: Tensor, v: Tensor, params: SlidingWindowParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Saves q, k, v alone; the backward pass scores each block again."""
    out: Tensor = _Window.apply(q, k, v, params)  # type: ignore[no-untyped-call]
    return out


class _Block(NamedTuple):
    """Queries, the keys that their windows cover, and which pairs are inside a window."""

    rows: slice
    keys: slice
    mask: Tensor


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, params: SlidingWindowParams) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for block in _blocks(q, params):
            with stage("attend"):
                keys, values = expand_heads(q, k[:, :, block.keys], v[:, :, block.keys])
                out[:, :, block.rows] = attend(q[:, :, block.rows], keys, values, q.shape[-1] ** -0.5, block.mask)
        ctx.save_for_backward(q, k, v)
        ctx.params = params
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), zeros_wide(k), zeros_wide(v)
        for block in _blocks(q, ctx.params):
            keys, values = expand_heads(q, k[:, :, block.keys], v[:, :, block.keys])
            query, upstream = q[:, :, block.rows], grad[:, :, block.rows]
            parts = attend_backward(upstream, query, keys, values, scale=q.shape[-1] ** -0.5, mask=block.mask)
            dq[:, :, block.rows] = parts[0]
            dk[:, :, block.keys] += _sum_groups(parts[1], k.shape[1])
            dv[:, :, block.keys] += _sum_groups(parts[2], k.shape[1])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor, params: SlidingWindowParams) -> Iterator[_Block]:
    """Blocks about as long as the window is wide: then about half of the scores made are inside a window."""
    n = q.shape[2]
    before, after = (min(reach, n - 1) for reach in params.reach)
    width = before + after + 1
    score_bytes = 4 * wide(q[..., :0]).element_size()  # scores, probabilities and their two gradients
    step = min(max(width, _LEAST_BLOCK), rows_per_chunk(q, q.shape[0] * q.shape[1] * 2 * width * score_bytes))
    for start in range(0, n, step):
        stop = min(start + step, n)
        low, high = max(0, start - before), min(n, stop + after)
        places = torch.arange(low, high, device=q.device)
        yield _Block(slice(start, stop), slice(low, high), band(torch.arange(start, stop, device=q.device), places, params))


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """Sum the gradients `[B, H, M, D]` of the query heads that share a key head."""
    return wide(x).reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2)
