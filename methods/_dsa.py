"""DeepSeek sparse attention in chunks of queries: the N x M index scores never exist, and indices are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.stages import stage

from ._chunks import row_chunks
from ._topk import attend_chosen
from .dsa import first_best, index_keys, index_queries, index_scores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .dsa import DsaParams


def chunked(q: Tensor, k: Tensor, v: Tensor, params: DsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory O(N K) indices, shared by the heads, and one chunk of scores."""
    return attend_chosen(q, k, v, select(q, k, params, weights), *weights.values())


@torch.no_grad()
def select(q: Tensor, k: Tensor, params: DsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """Keys `[B, 1, N, K]` as int32 with the largest index scores, -1 where a causal query sees fewer than K."""
    index = torch.full((q.shape[0], 1, q.shape[2], min(params.topk, k.shape[2])), -1, dtype=torch.int32, device=q.device)
    with stage("project"):
        (query, gate), key = index_queries(q, params, weights), index_keys(k, params, weights)
    for rows in row_chunks(q, 8 * q.shape[0] * k.shape[2] * key.element_size()):  # sum, product, masked copies, counts, workspace
        visible = min(rows.stop, k.shape[2]) if params.causal else k.shape[2]
        with stage("score"):
            scores = index_scores(query[:, :, rows], gate[:, :, rows], key[:, :, :visible])
        with stage("select"):
            best = first_best(scores, torch.arange(rows.start, rows.stop, device=q.device), params)
            index[:, :, rows, : best.shape[-1]] = best.to(torch.int32)
    return index
