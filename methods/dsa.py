"""DeepSeek sparse attention: a small indexer scores every key for every query, and all heads attend to the K keys it likes best.

With `x_t` and `y_s` the q and k of a token, all heads side by side, the lightning indexer is
`qI_tj = x_t W_j [d_I]` for `j = 1 .. H_I`, `kI_s = LayerNorm(y_s W_k) [d_I]`, `w_t = x_t W_w / sqrt(H_I d_I) [H_I]`,
`I_ts = sum_j w_tj ReLU(qI_tj . kI_s)`, `T_t = top-K_s I_ts`, and then in each head
`o_t = sum_{s in T_t} softmax_{s in T_t}(q_t . k_s / sqrt(D)) v_s`.
DeepSeek-AI 2025, "DeepSeek-V3.2", https://arxiv.org/abs/2512.02556; indexer after https://github.com/deepseek-ai/DeepSeek-V3.2-Exp.

Departures: the paper's indexer reads the layer's input and its compressed query, this one q and k; main attention is over the given
heads, not latent attention; no rotary embedding and no 8-bit numbers in the indexer, and no Hadamard rotation, which changes no product.
Bidirectional, our addition: nothing is hidden. The paper's K = 2048 is kept; its H_I = 64 and d_I = 128 serve 128 heads, and would
cost twice what dense attention costs at 16 heads of 64, so that the defaults are 4 and 32: there a sixteenth of it. Scores tie where
no head of the indexer fires: then the earlier keys are read. No gradient passes the choice: the paper trains the indexer by a loss of
its own, and as initialised it chooses by random projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, relu

from attnbench.eager import attend, causal_mask, expand_heads, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._chunks import rows_per_chunk
from ._skim import selecting
from .topk import TopkParams, choose, reads

if TYPE_CHECKING:
    from collections.abc import Mapping

EPS = 1e-6
"""of the layer normalisation of indexer keys"""
COPIES = 8
"""tensors of the size of a chunk's scores that choosing keeps at once: sum, product, masked copies, counts, workspace"""
_ROWS = 64  # queries evaluated at a time, each with keys of its own in every head


@dataclass(frozen=True, kw_only=True)
class DsaParams(TopkParams):
    """Hyper-parameters of DeepSeek sparse attention."""

    topk: int = param(2048, "keys that each query reads, the same in all heads", unit="keys", low=1, at_most="keys")
    index_heads: int = param(4, "heads of the indexer, H_I; the paper's is 64", low=1)
    index_dim: int = param(32, "head dimension of the indexer, d_I; the paper's is 128", low=1)

    def fitted(self, shape: Shape) -> Self:
        """Clamps K to half the keys: with all of them there would be nothing to choose."""
        return replace(self, topk=max(1, min(self.topk, shape.keys // 2)))


def draw(shape: Shape, params: DsaParams, generator: torch.Generator) -> Weights:
    """Projections from N(0, 0.006^2), as all matrices of DeepSeek-V3, and a layer norm that does nothing yet."""
    queries, keys, d = shape.heads * shape.dim, shape.kv_heads * shape.dim, params.index_dim

    def normal(*size: int) -> Tensor:
        return 0.006 * torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "query": normal(queries, params.index_heads * d),
        "key": normal(keys, d),
        "gate": normal(queries, params.index_heads),
        "norm_weight": torch.ones(d, dtype=torch.float64),
        "norm_bias": torch.zeros(d, dtype=torch.float64),
    }


def _tokens(x: Tensor) -> Tensor:
    """Heads side by side: `[B, H, N, D]` -> `[B, N, H D]`, in at least float32."""
    return wide(x.transpose(1, 2).flatten(2))


def index_queries(q: Tensor, params: DsaParams, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`qI [B, H_I, N, d_I]` and `w [B, H_I, N, 1]` of `q: [B, H, N, D]`."""
    x = _tokens(q)
    query = (x @ wide(w["query"])).unflatten(-1, (params.index_heads, -1)).transpose(1, 2)
    gate = (x @ wide(w["gate"])).transpose(1, 2).unsqueeze(-1)
    return query, gate * (params.index_heads * params.index_dim) ** -0.5


def index_keys(k: Tensor, params: DsaParams, w: Mapping[str, Tensor]) -> Tensor:
    """`kI [B, 1, M, d_I]` of `k: [B, Hkv, M, D]`."""
    key = _tokens(k) @ wide(w["key"])
    return layer_norm(key, (params.index_dim,), wide(w["norm_weight"]), wide(w["norm_bias"]), EPS).unsqueeze(1)


def index_scores(query: Tensor, gate: Tensor, key: Tensor) -> Tensor:
    """`I [B, 1, N, M]`, one head of the indexer after another, so that their products never exist together."""
    scores = key.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2])
    for j in range(query.shape[1]):
        scores += gate[:, j : j + 1] * relu(query[:, j : j + 1] @ key.transpose(-1, -2))
    return scores


@torch.no_grad()
def first_best(scores: Tensor, rows: Tensor, params: TopkParams) -> Tensor:
    """Keys `[B, 1, R, K]` with the largest `scores: [B, 1, R, M]`, the earlier ones where scores tie; -1 where there is none."""
    if params.causal:
        scores = scores.masked_fill(~causal_mask(rows, scores.shape[-1]), float("-inf"))
    count = min(params.topk, scores.shape[-1])
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    late = scores == least
    late &= late.cumsum(-1) > count - (scores > least).sum(-1, keepdim=True)
    return choose(scores.masked_fill(late, float("-inf")), rows, params)


@torch.no_grad()
def chosen(q: Tensor, k: Tensor, rows: Tensor, params: DsaParams, w: Mapping[str, Tensor]) -> Tensor:
    """Keys `[B, 1, R, K]` of the queries `q: [B, H, R, D]` at positions `rows`, the same for all heads; -1 where there is none.

    Some queries at a time: N x M scores never exist.
    """
    (query, gate), key = index_queries(q, params, w), index_keys(k, params, w)
    step = rows_per_chunk(q, COPIES * q.shape[0] * k.shape[2] * key.element_size())
    parts = zip(query.split(step, 2), gate.split(step, 2), rows.split(step), strict=True)
    return torch.cat([first_best(index_scores(x, factor, key), own, params) for x, factor, own in parts], 2)


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: DsaParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition. Gathers K keys a head for each query asked for, some queries at a time."""
    w = given(weights, draw, (q, k, v), params)
    index = chosen(take(q, rows), k, positions(q, rows), params, w)
    k, v = expand_heads(q, k, v)
    parts = zip(take(q, rows).split(_ROWS, 2), index.split(_ROWS, 2), strict=True)
    return torch.cat([_attend(x, k, v, own) for x, own in parts], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Each query of `q: [B, H, R, D]` attends to its own keys `index: [B, 1, R, K]`."""
    b, h, r, _ = q.shape
    places = index.clamp(min=0).expand(b, h, r, -1).flatten(2).unsqueeze(-1)
    keys, values = (x.gather(2, places.expand(-1, -1, -1, x.shape[-1])).unflatten(2, (r, -1)) for x in (k, v))
    return attend(q.unsqueeze(3), keys, values, q.shape[-1] ** -0.5, (index >= 0).unsqueeze(3)).squeeze(3)


def experts(q: Tensor, k: Tensor, v: Tensor, params: DsaParams, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """N experts of K tokens, expert i gathered for query i and used by it alone; heads share the tokens."""
    w = given(weights, draw, (q, k, v), params)
    rows = positions(q, None)
    index = chosen(q, k, rows, params, w).expand(-1, q.shape[1], -1, -1)
    k, v = expand_heads(q, k, v)
    routes = rows.view(1, 1, -1, 1).expand(*q.shape[:2], -1, 1)
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5),))


def cost(shape: Shape, params: DsaParams) -> Cost:
    """2 H_I (d_I + 1) FLOP for each visible pair, once for all heads, then 2 K (D + Dv) a query and head; and the indexer's projections.

    The choice needs no gradient. Traffic: K rows of k and of v gathered for each query and head, the learned weights, what the
    indexer projects, and 4-byte indices once for all heads.
    """
    s, h, d = shape, params.index_heads, params.index_dim
    queries, keys, own = s.heads * s.dim, s.kv_heads * s.dim, h * (d + 1)
    read = s.batch * s.heads * reads(s, params.topk, causal=params.causal)
    flops = {
        "project": 2 * s.batch * (s.n * queries * own + s.keys * keys * d),
        "score": 2 * s.batch * reads(s, s.keys, causal=params.causal) * own,
        "attend": 2 * read * (s.dim + s.dim_v),
    }
    learned = queries * own + keys * d + 2 * d
    extra = read * (s.dim + s.dim_v) + learned + s.batch * (s.n * own + s.keys * d)
    return Cost.of(s, flops, extra=extra, index_bytes=4 * s.batch * s.n * min(params.topk, s.keys), selection=("project", "score"))


def budget(_shape: Shape, _params: DsaParams, units: int) -> dict[str, object]:
    """As many keys."""
    return {"topk": units}


def _refused(shape: Shape, params: Params, _dtype: torch.dtype) -> list[str]:
    from attnbench.kernels.topk import MOST_KEYS, supported

    assert isinstance(params, DsaParams)
    return supported(params.index_dim, shape.keys, min(params.topk, MOST_KEYS), torch.float32)


METHOD = Method(
    name="dsa",
    title="DSA",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.SKIM, Topology.ONE_TO_ONE),
    citation=Citation(
        "DeepSeek-AI",
        2025,
        "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        "https://arxiv.org/abs/2512.02556",
        "arXiv",
    ),
    params=DsaParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    weights=draw,
    limits=Limits(cross=True),
    implementations=(
        selecting("dsa", _refused),
        Implementation(
            "chunked", "attnbench.methods._dsa:chunked", Limits(cross=True), note="chunks of queries; keeps the chosen indices only"
        ),
    ),
    selective=True,
    couples_heads=True,
)
