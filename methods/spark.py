"""Spark attention: a few dimensions of queries and keys decide which keys a query reads, the others how strongly.

The first r dimensions predict: `u_ij = q_i[:r] . k_j[:r]`. Query i keeps the keys above a threshold from the statistics of its scores,
`T_i = {j : u_ij >= t_i}`, `t_i = mean_j u_ij + std_j u_ij Phi^-1(1 - K / n)`, where j runs over the n keys that it sees and Phi is the
normal distribution function: K keys, were the scores normal. With `c_r = r^-1/2` and `c_s = (D - r)^-1/2`
`o_i = sum_{j in T_i} softmax_{j in T_i}(c_r u_ij) softplus(c_s q_i[r:] . k_j[r:]) v_j`: a gated layer, whose weights do not sum to 1.
You et al. 2025, "Spark Transformer", https://arxiv.org/abs/2506.06644.

A query that sees at most K keys keeps all. Where no key reaches the threshold, those with the largest score are kept. Causal:
statistics over the keys that a query sees. No gradient passes the threshold. There is no public code; the estimate of the standard
deviation (`unbiased`) and the two scales (`scale`) are parameters, and rotary embeddings are a layer's business. Not softmax
attention where all keys are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from attnbench.eager import causal_mask, expand_heads, masked_softmax, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._chunks import rows_per_chunk
from ._skim import thresholded
from .topk import reads

_COPIES = 6
"""tensors of the size of a chunk's scores that are alive at once: deviations, masked copies, squares"""


@dataclass(frozen=True, kw_only=True)
class SparkParams(Params):
    """Hyper-parameters of Spark attention; the defaults are the paper's."""

    topk: int = param(256, "keys that a query keeps where its scores are normal, K", unit="keys", low=1, at_most="keys")
    predictor: int = param(0, "dimensions that predict, r; 0 means D/2", unit="dimensions", low=0)
    unbiased: bool = param(False, "divide the squared deviations by n - 1, not n")
    scale: Literal["parts", "whole"] = param("parts", "`parts`: r^-1/2 and (D - r)^-1/2; `whole`: D^-1/2 for both")

    def problems(self, shape: Shape) -> list[str]:
        """Adds a split that leaves no dimension to one of the two parts."""
        found = super().problems(shape)
        if shape.dim < 2:
            return [*found, f"D = {shape.dim} cannot be split in two: it needs at least 2"]
        if self.predictor >= shape.dim:
            found.append(f"predictor = {self.predictor} leaves nothing of D = {shape.dim}: lower predictor")
        return found

    def fitted(self, shape: Shape) -> Self:
        """Clamps K to half the keys: with all of them there would be nothing to predict."""
        return replace(self, topk=max(1, min(self.topk, shape.keys // 2)), predictor=min(self.predictor, shape.dim - 1))

    def split(self, dim: int) -> int:
        """r."""
        return self.predictor or dim // 2

    def factors(self, dim: int) -> tuple[float, float]:
        """`c_r` and `c_s`."""
        r = self.split(dim)
        return (r**-0.5, (dim - r) ** -0.5) if self.scale == "parts" else (dim**-0.5, dim**-0.5)


@torch.no_grad()
def threshold(scores: Tensor, rows: Tensor, params: SparkParams) -> Tensor:
    """`t [B, H, R, 1]` of the scores `[B, H, R, M]` of the queries at positions `rows`: a query keeps the keys at or above it."""
    keys = scores.shape[-1]
    seen = causal_mask(rows if params.causal else torch.full_like(rows[:1], keys), keys)
    count = seen.sum(-1, keepdim=True)
    mean = scores.masked_fill(~seen, 0.0).sum(-1, keepdim=True) / count
    squares = (scores - mean).masked_fill(~seen, 0.0).square().sum(-1, keepdim=True)
    return lowered(mean + deviations(squares, count, params), scores.masked_fill(~seen, float("-inf")))


def deviations(squares: Tensor, count: Tensor, params: SparkParams) -> Tensor:
    """`std Phi^-1(1 - K / n)` for sums of squared deviations over `count` = n keys each; -inf where all keys are kept."""
    return scaled(squares, counted(count, params, squares.dtype))


class Counts(NamedTuple):
    """What thresholds take from the numbers of keys."""

    quantile: Tensor
    """Phi^-1(1 - K / n)"""
    divisor: Tensor
    """of sums of squared deviations"""
    whole: Tensor
    """whether all keys are kept"""


def counted(count: Tensor, params: SparkParams, dtype: torch.dtype) -> Counts:
    """Of `count` = n keys each."""
    quantile: Tensor = torch.special.ndtri(1 - params.topk / count.double().clamp(min=params.topk + 1)).to(dtype)
    return Counts(quantile, (count - int(params.unbiased)).clamp(min=1), count <= params.topk)


def scaled(squares: Tensor, counts: Counts) -> Tensor:
    """Deviations from their sums of squares."""
    return ((squares / counts.divisor).sqrt() * counts.quantile).masked_fill(counts.whole, float("-inf"))


def lowered(limit: Tensor, scores: Tensor) -> Tensor:
    """The threshold `limit: [.., 1]`, or the largest of the scores `[.., M]` where that is less: at least one key is kept."""
    return torch.minimum(limit, scores.amax(-1, keepdim=True))


def halves(x: Tensor, params: SparkParams) -> tuple[Tensor, Tensor]:
    """The dimensions that predict and the others, in at least float32."""
    r = params.split(x.shape[-1])
    return wide(x[..., :r]), wide(x[..., r:])


def reference(q: Tensor, k: Tensor, v: Tensor, params: SparkParams, rows: Tensor | None = None) -> Tensor:
    """The definition; everything before the values is in at least float32."""
    k, v = expand_heads(q, k, v)
    rows, (scale, scale_s) = positions(q, rows), params.factors(q.shape[-1])
    (q_r, q_s), (k_r, k_s) = halves(take(q, rows), params), halves(k, params)
    scores = q_r @ k_r.transpose(-1, -2)
    weights = masked_softmax(scale * scores, kept(scores, rows, params)) * softplus(scale_s * (q_s @ k_s.transpose(-1, -2)))
    return weights.to(v.dtype) @ v


def kept(scores: Tensor, rows: Tensor, params: SparkParams) -> Tensor:
    """`[B, H, R, M]`, True where a query keeps a key."""
    return above(scores, threshold(scores, rows, params), rows, params)


def above(scores: Tensor, limit: Tensor, rows: Tensor, params: SparkParams) -> Tensor:
    """`[B, H, R, M]`, True where a query sees a key whose score reaches its threshold `limit: [B, H, R, 1]`."""
    return scores >= limit if not params.causal else (scores >= limit) & causal_mask(rows, scores.shape[-1])


def experts(q: Tensor, k: Tensor, v: Tensor, params: SparkParams) -> FastWeights:
    """N experts of about K tokens, expert i for query i alone: a gated layer whose first weights have two parts."""
    k, v = expand_heads(q, k, v)
    rows, (scale, scale_s) = positions(q, None), params.factors(q.shape[-1])
    index = _index(halves(q, params)[0], halves(k, params)[0], params)

    def predicting(x: Tensor, _rows: Tensor) -> Tensor:
        first, other = halves(x, params)
        return torch.cat([first, torch.zeros_like(other)], -1)

    def gate(x: Tensor, w1: Tensor) -> Tensor:
        return softplus(scale_s * (halves(w1, params)[1] @ halves(x, params)[1].unsqueeze(-1)).squeeze(-1))

    routes = rows.view(1, 1, -1, 1).expand(*q.shape[:2], -1, 1)
    return FastWeights((Bank(k, v, index, routes=routes, scale=scale, query_map=predicting, factor=gate),))


@torch.no_grad()
def _index(q_r: Tensor, k_r: Tensor, params: SparkParams) -> Tensor:
    """Keys `[B, H, N, W]` as int32 that each query keeps, -1 behind them; W is the most that any keeps.

    Some queries at a time, and twice: thresholds first, so that no list exists beside the whole when it is written.
    """
    score_bytes = _COPIES * q_r.shape[0] * q_r.shape[1] * k_r.shape[2] * q_r.element_size()
    step, keys, limits, widest = rows_per_chunk(q_r, score_bytes), k_r.transpose(-1, -2), [], 0
    parts = list(zip(q_r.split(step, 2), positions(q_r, None).split(step), strict=True))
    for part, rows in parts:
        scores = part @ keys
        limits.append(threshold(scores, rows, params))
        widest = max(widest, int(above(scores, limits[-1], rows, params).sum(-1).max()))
    index = torch.full((*q_r.shape[:3], widest), -1, dtype=torch.int32, device=q_r.device)
    for (part, rows), limit, own in zip(parts, limits, index.split(step, 2), strict=True):
        listed = _listed(above(part @ keys, limit, rows, params))
        own[..., : listed.shape[-1]] = listed
    return index


def _listed(mask: Tensor) -> Tensor:
    """Positions `[B, H, R, W]` where `mask: [B, H, R, M]` is True, -1 behind them; W is the most that any row has."""
    count = mask.sum(-1, keepdim=True)
    first = mask.to(torch.int8).topk(int(count.max()), -1).indices
    return first.masked_fill(torch.arange(first.shape[-1], device=mask.device) >= count, -1)


def cost(shape: Shape, params: SparkParams) -> Cost:
    """2 N M r FLOP a head to predict, 3 N M for mean and deviation, then 2 N K (D + Dv) where K of the visible keys are kept.

    No gradient passes the choice. Traffic: K rows of k and of v gathered for each query, and 4-byte indices.
    """
    heads = shape.batch * shape.heads
    scored, read = (heads * reads(shape, most, causal=params.causal) for most in (shape.keys, params.topk))
    flops = {"score": 2 * scored * params.split(shape.dim), "select": 3 * scored, "attend": 2 * read * (shape.dim + shape.dim_v)}
    gathered = read * (shape.dim + shape.dim_v)
    indices = 4 * heads * shape.n * min(params.topk, shape.keys)
    return Cost.of(shape, flops, extra=gathered, index_bytes=indices, selection=("score", "select"))


def budget(_shape: Shape, _params: SparkParams, units: int) -> dict[str, object]:
    """As many keys, were the scores normal."""
    return {"topk": units}


METHOD = Method(
    name="spark",
    title="Spark",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.SKIM, Topology.ONE_TO_ONE),
    citation=Citation(
        "You et al.", 2025, "Spark Transformer: Reactivating Sparsity in FFN and Attention", "https://arxiv.org/abs/2506.06644", "NeurIPS"
    ),
    params=SparkParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True),
    implementations=(
        *thresholded(),
        Implementation(
            "chunked",
            "attnbench.methods._spark:chunked",
            Limits(cross=True),
            note="chunks of queries, masked; scores computed anew in the backward pass",
        ),
    ),
    selective=True,
)
