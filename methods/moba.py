"""MoBA, mixture of block attention: each query attends to the K blocks of keys whose mean key it likes best.

`s_ib = q_i . mean_{j in b} k_j`, `B_i = top-K_b s_ib`, `o_i = sum_{j in B_i} softmax_{j in B_i}(q_i . k_j / sqrt(D)) v_j`, one softmax over
the keys of all chosen blocks. Lu et al. 2025, equations 2 to 6, https://arxiv.org/abs/2502.13189. Causal, the paper's form: the block of
the query itself is always among the K and causal inside, later blocks never are. Bidirectional, our addition: no block is forced
and none is hidden. A last block shorter than the others is averaged over its true length; where there are fewer than K blocks all
are read. Scores are in at least float32, and no gradient flows through the choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.eager import attend, causal_mask, expand_heads, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._chunks import chosen_by_rows
from ._routed import implementation
from ._varlen import segment_reasons, varlen_reasons

_COPIES = 3
"""tensors of the size of a chunk's scores that are alive at once: scores, masked copy, workspace"""


@dataclass(frozen=True, kw_only=True)
class MobaParams(Params):
    """Hyper-parameters of MoBA; the defaults are the paper's for 8192 tokens."""

    block: int = param(512, "consecutive keys in a block", unit="keys", low=1)
    topk: int = param(3, "blocks that each query reads, its own included where causal; all where there are fewer", unit="blocks", low=1)

    def blocks(self, keys: int) -> int:
        """Blocks that `keys` keys make, a short last one included."""
        return -(-keys // self.block)


@torch.no_grad()
def block_means(k: Tensor, params: MobaParams) -> Tensor:
    """Mean key of each block, `[B, Hkv, M, D]` -> `[B, Hkv, E, D]` in at least float32."""
    whole, dtype = k.shape[2] // params.block * params.block, torch.promote_types(k.dtype, torch.float32)
    means = [k[:, :, :whole].unflatten(2, (-1, params.block)).mean(3, dtype=dtype)] if whole else []
    rest = [k[:, :, whole:].mean(2, keepdim=True, dtype=dtype)] if whole < k.shape[2] else []
    return torch.cat([*means, *rest], 2)


@torch.no_grad()
def block_scores(q: Tensor, means: Tensor, rows: Tensor, params: MobaParams) -> Tensor:
    """Score `[B, H, R, E]` of each block for the queries at positions `rows`. Causal: -inf for later blocks, +inf for a query's own."""
    means, _ = expand_heads(q, means, means)
    scores = wide(q) @ means.transpose(-1, -2)
    if params.causal:
        block, own = torch.arange(means.shape[2], device=q.device), rows[:, None] // params.block
        scores.masked_fill_(block > own, float("-inf")).masked_fill_(block == own, float("inf"))
    return scores


@torch.no_grad()
def choose(q: Tensor, means: Tensor, rows: Tensor, params: MobaParams) -> Tensor:
    """Blocks `[B, H, R, S]` for the queries `q: [B, H, R, D]` at positions `rows`, best first; -1 where there is none.

    `S = min(K, E)`. Causal, the query's own block comes first.
    """
    best = block_scores(q, means, rows, params).topk(min(params.topk, means.shape[2]), -1)
    return best.indices.masked_fill(best.values == float("-inf"), -1)


def reference(q: Tensor, k: Tensor, v: Tensor, params: MobaParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    rows, q = positions(q, rows), take(q, rows)
    chosen = choose(q, block_means(k, params), rows, params)
    blocks, keys = params.blocks(k.shape[2]), k.shape[2]
    read = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=q.device)
    read.scatter_(-1, chosen.masked_fill(chosen < 0, blocks), True)
    mask = read[..., torch.arange(keys, device=q.device) // params.block]
    k, v = expand_heads(q, k, v)
    return attend(q, k, v, q.shape[-1] ** -0.5, mask & causal_mask(rows, keys) if params.causal else mask)


def experts(q: Tensor, k: Tensor, v: Tensor, params: MobaParams) -> FastWeights:
    """One expert a block, as wide as the block; each query routed to min(K, E) of them."""
    means = block_means(k, params)
    routes = chosen_by_rows(lambda x, rows: choose(x, means, rows, params), q, _COPIES * means.shape[2])
    k, v = expand_heads(q, k, v)
    keys = k.shape[2]
    token = torch.arange(params.blocks(keys) * params.block, device=k.device).view(-1, params.block)[:, :keys]
    index = token.masked_fill(token >= keys, -1).expand(*k.shape[:2], -1, -1)
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5, causal=params.causal),))


def cost(shape: Shape, params: MobaParams) -> Cost:
    """M D additions a key head for the means, 2 D FLOP for each block scored, 2 (D + Dv) for each key read.

    Bidirectional, every query counts as reading K whole blocks (at most M keys): an upper bound where the last block is short.
    """
    n, block, blocks = shape.n, params.block, params.blocks(shape.keys)
    scored, read = n * blocks, n * min(params.topk * block, shape.keys)
    if params.causal:  # queries of block b score b blocks and read min(K - 1, b) of them, then their own up to themselves
        lengths = [min(block, n - start) for start in range(0, n, block)]
        scored = sum(b * length for b, length in enumerate(lengths))
        read = sum(min(params.topk - 1, b) * block * length + length * (length + 1) // 2 for b, length in enumerate(lengths))
    heads = shape.batch * shape.heads
    flops = {
        "pool": shape.batch * shape.kv_heads * shape.keys * shape.dim,
        "route": 2 * heads * scored * shape.dim,
        "score": 2 * heads * read * shape.dim,
        "attend": 2 * heads * read * shape.dim_v,
    }
    kv_heads, index = shape.batch * shape.kv_heads, 4 * heads * n * min(params.topk, blocks)
    traffic = {
        "pool": kv_heads * (shape.keys + blocks) * shape.dim,
        "route": (heads * n + kv_heads * blocks) * shape.dim,
        "attend": (heads * n + kv_heads * shape.keys) * (shape.dim + shape.dim_v),
    }
    moved = {"route": index, "permute": 2 * index, "attend": index}
    return Cost.of(shape, flops, index_bytes=index, selection=("pool", "route", "permute"), traffic=traffic, index_traffic=moved)


def budget(_shape: Shape, params: MobaParams, units: int) -> dict[str, object]:
    """Blocks of such a size that K of them hold as many keys."""
    return {"block": max(1, round(units / params.topk))}


def _varlen_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    assert isinstance(params, MobaParams)
    segments = shape.batch * shape.heads * params.blocks(shape.keys)
    return varlen_reasons(shape, params, dtype, device) + segment_reasons(segments, device)


def _pairs(shape: Shape, params: Params) -> int:
    assert isinstance(params, MobaParams)
    return shape.batch * shape.heads * shape.n * min(params.topk, params.blocks(shape.keys))


METHOD = Method(
    name="moba",
    title="MoBA",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.BLOCKS, Construction.LOCALITY_PRIOR, Topology.N_TO_BLOCKS),
    citation=Citation("Lu et al.", 2025, "MoBA: Mixture of Block Attention", "https://arxiv.org/abs/2502.13189", "NeurIPS"),
    params=MobaParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    implementations=(
        implementation(
            "attnbench.methods._moba:fused", _pairs, "blocks chosen, queries sorted by block, partial outputs merged, in fused kernels"
        ),
        Implementation(
            "varlen",
            "attnbench.methods._moba:varlen",
            Limits(extra=_varlen_reasons, no_graph="the queries of each block are counted on the device and the counts read back"),
            note="queries sorted by block, variable-length flash attention, merged by log-sum-exp",
        ),
    ),
    selective=True,
)
