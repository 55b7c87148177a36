"""MoBA with queries sorted by block: as segments of variable-length attention whose parts are merged, or by the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.stages import stage

from ._blocks import own_part, routed_part
from ._chunks import rows_per_chunk
from ._routes import largest
from ._varlen import merged_attention
from .moba import block_means, block_scores

if TYPE_CHECKING:
    from torch import Tensor

    from .moba import MobaParams


def varlen(q: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`: one part for the chosen blocks; causal, one more before it for the query's own block."""
    chosen = route(q, k, params)
    with stage("permute"):
        parts = [own_part(q, k, v, params.block)] if params.causal else []
        chosen = chosen[..., len(parts) :]
        parts += [routed_part(chosen, k, v, params.block)] if chosen.shape[3] else []
    out = merged_attention(q.reshape(-1, q.shape[3]), parts, q.shape[3] ** -0.5)
    return out.view(*q.shape[:3], v.shape[3])


def fused(q: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> Tensor:
    """The same, by `attnbench.kernels.blocks`."""
    from attnbench.kernels.blocks import attend_blocks, route_blocks

    with stage("pool"):
        means = block_means(k, params)
    with stage("route"):
        chosen = route_blocks(q, means, params.topk, params.block, params.causal)
    with stage("permute"):
        return attend_blocks(q, k, v, chosen, params.block, causal=params.causal)


@torch.no_grad()
def route(q: Tensor, k: Tensor, params: MobaParams) -> Tensor:
    """Chosen blocks `[B, H, N, S]`, -1 for none, scored by chunks of queries."""
    with stage("pool"):
        means = block_means(k, params)
    score_bytes = q.shape[0] * q.shape[1] * (means.shape[2] + q.shape[3]) * means.element_size()
    slots, chosen = min(params.topk, means.shape[2]), []
    with stage("route"):
        length = rows_per_chunk(q, score_bytes)
        for queries, part in zip(q.split(length, 2), torch.arange(q.shape[2], device=q.device).split(length), strict=True):
            values, blocks = largest(block_scores(queries, means, part, params), slots)
            chosen.append(blocks.masked_fill_(values == float("-inf"), -1) if params.causal else blocks)
        return torch.cat(chosen, 2)
