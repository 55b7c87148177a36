"""Strided attention: each query attends to every stride-th key, counted from its own position.

`o_i = sum_{j in S_i} softmax_{j in S_i}(q_i . k_j / sqrt(D)) v_j` with `S_i = {j : j = i mod stride}`; causal: those with `j <= i`. After
Child et al. 2019, "Generating Long Sequences with Sparse Transformers", https://arxiv.org/abs/1904.10509. Departures: the paper's heads
attend to neighbouring keys too.
"""

# A method that works as it is: change it piece by piece, this docstring first, and run `attnbench check` after each.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attnbench.eager import attend, expand_heads, positions, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Method, Params, Shape, param
from attnbench.sdpa import attention
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology


# Hyper-parameters, with their defaults; `--set template.stride=16` sets one. `causal` is inherited.
@dataclass(frozen=True, kw_only=True)
class TemplateParams(Params):
    """Hyper-parameters of strided attention."""

    stride: int = param(8, "distance between keys that a query reads", unit="tokens", low=1)


# The definition, for any float dtype, as plain as can be: all else is held against it. Where it cannot compute some rows alone, leave
# out `rows`.
def reference(q: Tensor, k: Tensor, v: Tensor, params: TemplateParams, rows: Tensor | None = None) -> Tensor:
    """The definition. `q: [B, H, N, D]`, `k, v: [B, Hkv, N, D]` -> `[B, H, N, Dv]`, of the queries at positions `rows` where given."""
    k, v = expand_heads(q, k, v)
    query, key = positions(q, rows)[:, None], positions(k, None)
    mask = (query - key) % params.stride == 0
    if params.causal:
        mask = mask & (key <= query)
    return attend(take(q, rows), k, v, q.shape[-1] ** -0.5, mask)


# The same as fast weights: which tokens each expert holds, and which experts a query uses. `taxonomy --verify` measures coordinates on
# them. Where a method cannot be written so, leave this out and give METHOD no_experts="why".
def experts(q: Tensor, k: Tensor, v: Tensor, params: TemplateParams) -> FastWeights:
    """An expert for each remainder of division by the stride; a query uses that of its own position."""
    k, v = expand_heads(q, k, v)
    n, stride = q.shape[2], min(params.stride, q.shape[2])
    tokens = torch.arange(-(-n // stride) * stride, device=q.device).view(-1, stride).T
    index = tokens.masked_fill(tokens >= n, -1).expand(*q.shape[:2], -1, -1)  # [B, H, E, W], -1 where an expert is narrower
    routes = (positions(q, None) % stride)[:, None].expand(*q.shape[:2], -1, 1)  # [B, H, N, 1]
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5, causal=params.causal),))


# The work of one call, a multiply-add as 2 FLOP, by the stages of attnbench.stages.
def cost(shape: Shape, params: TemplateParams) -> Cost:
    """2 P (D + Dv) FLOP a head, P the pairs of equal remainder: the sum of their squared numbers; causal m (m + 1) / 2 of each m."""
    sizes = [len(range(first, shape.n, params.stride)) for first in range(min(params.stride, shape.n))]
    pairs = sum(m * (m + 1) // 2 if params.causal else m * m for m in sizes)
    heads = shape.batch * shape.heads
    return Cost.of(shape, {"score": 2 * heads * pairs * shape.dim, "attend": 2 * heads * pairs * shape.dim_v})


# Which parameters make a query read `units` keys, for `--budget`. Where none do, give METHOD no_budget="why" instead.
def budget(shape: Shape, _params: TemplateParams, units: int) -> dict[str, object]:
    """The stride that leaves as many keys."""
    return {"stride": max(1, round(shape.n / units))}


# A faster way to compute the same, of as many as there are. It may be in a file of its own, and is imported when it runs.
def split(q: Tensor, k: Tensor, v: Tensor, params: TemplateParams) -> Tensor:
    """Dense attention among the tokens of each remainder, all of which are padded to one length: `[B, H stride, W, D]`."""
    k, v = expand_heads(q, k, v)
    n, stride = q.shape[2], min(params.stride, q.shape[2])
    padding = -n % stride
    query, key, value = (functional.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, stride)).transpose(2, 3).flatten(1, 2) for x in (q, k, v))
    real = (torch.arange(n + padding, device=q.device) < n).view(-1, stride).T.repeat(q.shape[1], 1)[:, None]  # [H stride, 1, W]
    mask = None if params.causal or not padding else real  # padding comes last, where causal queries do not look
    out = attention(query, key, value, mask, causal=params.causal)  # torch's, by kernels whose gradients are finite at every length
    merged: Tensor = out.unflatten(1, (-1, stride)).transpose(2, 3).flatten(2, 3)
    return merged[:, :, :n]


METHOD = Method(
    name="template",  # as this file
    title="Template",  # as tables and figures print it
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.LANDMARKS, Construction.LOCALITY_PRIOR, Topology.BLOCK_TO_ONE),
    citation=Citation(
        "Child et al.", 2019, "Generating Long Sequences with Sparse Transformers", "https://arxiv.org/abs/1904.10509", "arXiv"
    ),
    params=TemplateParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    # Best first. Of one that needs a package: Implementation("triton", "my_kernels:strided", Limits(("cuda",)), requires=("triton",)).
    implementations=(Implementation("split", f"{__name__}:split"),),
)
