"""DeepSeek sparse attention in chunks of queries: the N x M index scores never exist, and indices are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbench.stages import stage

from ._chunks import row_chunks
from ._topk import attend_chosen
from .dsa import COPIES, first_best, index_keys, index_queries, index_scores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .dsa import DsaParams


def chunked(q: Tensor, k: Tensor, v: Tensor, params: DsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory O(N K) indices, shared by the heads, and one chunk of scores."""
    return _untrained(attend_chosen(q, k, v, select(q, k, params, weights)), weights)


def fused(q: Tensor, k: Tensor, v: Tensor, params: DsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """The same by `attnbench.kernels`, as far as these select so many keys; beyond, keys are selected in chunks and attended to by them."""
    from attnbench.kernels.gather import gather_attention
    from attnbench.kernels.topk import MOST_KEYS, select_indexed

    if min(params.topk, k.shape[2]) > MOST_KEYS:
        index = select(q, k, params, weights)
    else:
        with torch.no_grad(), stage("project"):
            (query, gate), key = index_queries(q, params, weights), index_keys(k, params, weights)
        index = select_indexed(query, gate.squeeze(-1), key, params.topk, causal=params.causal)
    return _untrained(gather_attention(q, k, v, index), weights)


class _Untrained(torch.autograd.Function):
    """The output as it is; the gradients of the weights that chose what it reads are zero."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def _untrained(out: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = _Untrained.apply(out, *weights.values())  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def select(q: Tensor, k: Tensor, params: DsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """Keys `[B, 1, N, K]` as int32 with the largest index scores, -1 where a causal query sees fewer than K."""
    index = torch.full((q.shape[0], 1, q.shape[2], min(params.topk, k.shape[2])), -1, dtype=torch.int32, device=q.device)
    with stage("project"):
        (query, gate), key = index_queries(q, params, weights), index_keys(k, params, weights)
    for rows in row_chunks(q, COPIES * q.shape[0] * k.shape[2] * key.element_size()):
        visible = min(rows.stop, k.shape[2]) if params.causal else k.shape[2]
        with stage("score"):
            scores = index_scores(query[:, :, rows], gate[:, :, rows], key[:, :, :visible])
        with stage("select"):
            best = first_best(scores, torch.arange(rows.start, rows.stop, device=q.device), params)
            index[:, :, rows, : best.shape[-1]] = best.to(torch.int32)
    return index
