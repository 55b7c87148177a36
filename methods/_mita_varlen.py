"""MiTA without a copy of keys for each query: queries sorted by expert, each expert attended once, parts merged by log-sum-exp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import expand_heads, wide
from attnbench.sdpa import attention
from attnbench.stages import stage

from ._landmarks import landmarks
from ._routes import largest
from ._varlen import Part, group_by_expert, make_part, merged_attention

if TYPE_CHECKING:
    from torch import Tensor

    from .mita import MitaParams

_TOKENS = 1 << 16  # tokens scored at a time, so that no float32 copy of all of q or k exists


def varlen(q: Tensor, k: Tensor, v: Tensor, params: MitaParams) -> Tensor:
    """`[B, H, N, Dv]`. Memory beside inputs and output: sorted queries, M K keys and values a head, M scores a key in float32."""
    k, v = expand_heads(q, k, v)
    r = landmarks(q, params)
    parts, scales = [], []
    if params.shared:
        with stage("compress"):
            values = attention(r, k, v)
        parts.append(_shared_part(r, values, q.shape[2]))
        scales.append(params.landmark_factor(q.shape[-1]))
    if params.routed:
        parts.append(_routed_part(q, k, v, r, params))
        scales.append(q.shape[-1] ** -0.5)
    return merged_attention(q.flatten(0, 2), parts, scales).view(*q.shape[:3], -1)


def _shared_part(r: Tensor, values: Tensor, n: int) -> Part:
    """All queries of a head read its landmarks."""
    heads, m = r.shape[0] * r.shape[1], r.shape[2]
    edges = torch.arange(heads + 1, dtype=torch.int32, device=r.device)
    return Part(None, r.flatten(0, 2), values.flatten(0, 2), edges * n, edges * m, n, m)


def _routed_part(q: Tensor, k: Tensor, v: Tensor, r: Tensor, params: MitaParams) -> Part:
    """Queries against the tokens of the S experts that each of them reads."""
    members, routes = _select(q, k, r, params)
    head = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1)
    with stage("gather"):
        tokens = (members + head * k.shape[2]).flatten()
        keys, values = (x.flatten(0, 2).index_select(0, tokens) for x in (k, v))
    experts = q.shape[0] * q.shape[1] * params.landmarks
    with stage("permute"):
        order, counts = group_by_expert((routes + head * params.landmarks).flatten(), experts)
        widths = torch.full((experts,), params.topk, device=q.device)
        return make_part(order, counts, keys, values, widths, slots=params.experts_per_query)


@torch.no_grad()
def _select(q: Tensor, k: Tensor, r: Tensor, params: MitaParams) -> tuple[Tensor, Tensor]:
    """Tokens of each expert `[B, H, M, K]` and experts of each query `[B, H, N, S]`; selection has no gradient."""
    r = wide(r)
    with stage("probe"):
        probe = torch.cat([r @ wide(part).transpose(-1, -2) for part in k.split(_TOKENS, 2)], -1)
    with stage("select"):
        members = probe.topk(params.topk, -1).indices
    with stage("route"):
        routes = [largest(wide(part) @ r.transpose(-1, -2), params.experts_per_query)[1] for part in q.split(_TOKENS, 2)]
        return members, torch.cat(routes, 2)
