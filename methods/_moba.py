"""MoBA with queries sorted by block: each block is a segment of variable-length attention, and the parts of a query are merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import expand_heads
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._routes import largest
from ._varlen import Part, group_by_expert, make_part, merged_attention, offsets
from .moba import block_lengths, block_means, block_scores

if TYPE_CHECKING:
    from torch import Tensor

    from .moba import MobaParams


def varlen(q: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`: one part for the chosen blocks; causal, one more before it for the query's own block."""
    chosen = route(q, k, params)
    with stage("permute"):
        parts = [_own_part(q, k, v, params)] if params.causal else []
        chosen = chosen[..., len(parts) :]
        parts += [_routed_part(chosen, k, v, params)] if chosen.shape[3] else []
    out = merged_attention(q.reshape(-1, q.shape[3]), parts, q.shape[3] ** -0.5)
    return out.view(*q.shape[:3], v.shape[3])


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


def _own_part(q: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> Part:
    """Every query against its own block, causal: segments in the order of the sequence."""
    k, v = expand_heads(q, k, v)
    counts = block_lengths(k.shape[2], params, k.device).repeat(k.shape[0] * k.shape[1])
    edges, longest = offsets(counts), min(params.block, k.shape[2])
    return Part(None, k.flatten(0, 2), v.flatten(0, 2), edges, edges, longest, longest, causal=True)


def _routed_part(chosen: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> Part:
    """Queries against the blocks of `chosen: [B, H, N, S]`; the heads of a group meet in the segments of their key head."""
    b, h, _, slots = chosen.shape
    lengths = block_lengths(k.shape[2], params, k.device)
    segments = k.shape[0] * k.shape[1] * len(lengths)
    head = torch.arange(b * h, device=k.device).view(b, h, 1, 1) // (h // k.shape[1])
    ids = head * len(lengths) + chosen
    ids = ids.masked_fill_(chosen < 0, segments) if params.causal else ids
    order, counts = group_by_expert(ids.flatten(), segments)
    return make_part(order, counts, k.flatten(0, 2), v.flatten(0, 2), lengths.repeat(k.shape[0] * k.shape[1]), slots=slots)
