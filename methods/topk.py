"""Exact per-query top-k attention: each query attends to the K keys with its largest scores.

`T_i = top-K_j (q_i . k_j)`, `o_i = sum_{j in T_i} softmax_{j in T_i}(q_i . k_j / sqrt(D)) v_j`. Zhao et al. 2019, "Explicit Sparse
Transformer", https://arxiv.org/abs/1912.11637; chunked over queries by Gupta et al. 2021, https://arxiv.org/abs/2106.06899.
Departure from the first paper: exactly K keys are kept where scores tie, not all keys that reach the K-th score. Causal: future keys
are hidden before the choice, so that query i keeps min(K, i + 1). No gradient flows through the choice.
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
from ._skim import selecting

_COPIES = 3
"""tensors of the size of a chunk's scores that are alive at once: scores, masked copy, workspace"""


@dataclass(frozen=True, kw_only=True)
class TopkParams(Params):
    """Hyper-parameters of top-k attention."""

    topk: int = param(32, "keys that each query reads", unit="keys", low=1, at_most="keys")


@torch.no_grad()
def choose(scores: Tensor, rows: Tensor, params: TopkParams) -> Tensor:
    """Keys `[B, H, R, K]` with the largest `scores: [B, H, R, M]` of the queries at positions `rows`; -1 where there is none."""
    if params.causal:
        scores = scores.masked_fill(~causal_mask(rows, scores.shape[-1]), float("-inf"))
    best = scores.topk(min(params.topk, scores.shape[-1]), -1)
    return best.indices.masked_fill(best.values == float("-inf"), -1)


def reference(q: Tensor, k: Tensor, v: Tensor, params: TopkParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    k, v = expand_heads(q, k, v)
    rows, q = positions(q, rows), take(q, rows)
    chosen = choose(wide(q) @ wide(k).transpose(-1, -2), rows, params)
    keys = k.shape[2]
    mask = torch.zeros(*chosen.shape[:3], keys + 1, dtype=torch.bool, device=q.device)
    mask.scatter_(-1, chosen.masked_fill(chosen < 0, keys), True)
    return attend(q, k, v, q.shape[-1] ** -0.5, mask[..., :-1])


def experts(q: Tensor, k: Tensor, v: Tensor, params: TopkParams) -> FastWeights:
    """N experts of K tokens, expert i gathered for query i and used by it alone."""
    k, v = expand_heads(q, k, v)
    keys = wide(k).transpose(-1, -2)
    index = chosen_by_rows(lambda x, rows: choose(wide(x) @ keys, rows, params), q, _COPIES * k.shape[2])
    routes = positions(q, None).view(1, 1, -1, 1).expand(*q.shape[:2], -1, 1)
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5),))


def cost(shape: Shape, params: TopkParams) -> Cost:
    """2 N M D FLOP a head to score all visible pairs, then 2 N K (D + Dv) to attend to the chosen ones.

    The choice needs no gradient. Traffic: K rows of k and of v gathered for each query, and 4-byte indices.
    """
    heads = shape.batch * shape.heads
    scored, read = (heads * reads(shape, most, causal=params.causal) for most in (shape.keys, params.topk))
    flops = {"score": 2 * scored * shape.dim, "attend": 2 * read * (shape.dim + shape.dim_v)}
    gathered, index = read * (shape.dim + shape.dim_v), 4 * heads * shape.n * min(params.topk, shape.keys)
    traffic = {
        "score": (heads * shape.n + shape.batch * shape.kv_heads * shape.keys) * shape.dim,
        "gather": gathered,
        "attend": heads * shape.n * (shape.dim + shape.dim_v),
    }
    written = {"select": index, "gather": index}
    return Cost.of(shape, flops, extra=gathered, index_bytes=index, selection=("score", "select"), traffic=traffic, index_traffic=written)


def reads(shape: Shape, most: int, *, causal: bool) -> int:
    """Pairs of a head when each query reads up to `most` of the keys it sees."""
    most = min(most, shape.keys)
    short = min(most, shape.n) if causal else 0  # causal queries that see at most `most` keys
    return short * (short + 1) // 2 + (shape.n - short) * most


def budget(_shape: Shape, _params: TopkParams, units: int) -> dict[str, object]:
    """As many keys."""
    return {"topk": units}


def _refused(shape: Shape, params: Params, dtype: torch.dtype) -> list[str]:
    from attnbench.kernels.topk import supported

    assert isinstance(params, TopkParams)
    return supported(shape.dim, shape.keys, params.topk, dtype)


METHOD = Method(
    name="topk",
    title="Top-k",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.EXACT_SKIM, Topology.ONE_TO_ONE),
    citation=Citation("Zhao et al.", 2019, "Explicit Sparse Transformer", "https://arxiv.org/abs/1912.11637", "arXiv"),
    params=TopkParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True),
    implementations=(
        selecting("topk", _refused),
        Implementation(
            "chunked", "attnbench.methods._topk:chunked", Limits(cross=True), note="chunks of queries; keeps the chosen indices only"
        ),
    ),
    selective=True,
)
