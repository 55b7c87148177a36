"""Linformer: keys and values mixed down to K rows by learned matrices over the token axis.

`o_i = sum_r softmax_r(q_i . (E k)_r / sqrt(D)) (F v)_r` with learned `E, F: [K, M]`.
Wang et al. 2020, equation 7, https://arxiv.org/abs/2006.04768.

The matrices are as long as the sequence: at M = 262144 and K = 256 they hold 134 million numbers. As in the authors' fairseq code one pair
serves all heads (the paper's headwise sharing) and is drawn Xavier-uniform with gain 1/sqrt(2); `per_head` gives each key head a pair
of its own, `share` takes F = E (key-value sharing). One matrix for all layers is the business of a model. No causal form: every row
mixes all tokens.

Departures: the matrices act on keys and values, where the authors' code lets them act on tokens before the projections, which is the same
but for a bias; a length other than the one they were drawn for needs other matrices, where that code takes their first columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnbench.eager import attend, expand_heads, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._compressed import attend_few
from ._project import project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Weights


@dataclass(frozen=True, kw_only=True)
class LinformerParams(Params):
    """How many rows are left, and who shares the matrices that make them."""

    rank: int = param(256, "projected keys and values, K, that each query reads", unit="keys", low=1, at_most="keys")
    per_head: bool = param(False, "a pair of matrices for each key head, not one for all")
    share: bool = param(False, "one matrix for keys and values, F = E")


def draw(shape: Shape, params: LinformerParams, generator: torch.Generator) -> Weights:
    """`e` and `f`, `[K, M]` or `[Hkv, K, M]`: uniform within `sqrt(3 / (K + M))`, Xavier with gain 1/sqrt(2); `share` has no `f`."""
    size = (*((shape.kv_heads,) if params.per_head else ()), params.rank, shape.keys)
    bound = (3 / (params.rank + shape.keys)) ** 0.5
    names = ("e",) if params.share else ("e", "f")
    return {name: torch.rand(size, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(bound) for name in names}


def _compressed(k: Tensor, v: Tensor, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `E k` `[B, Hkv, K, D]` and `F v` `[B, Hkv, K, Dv]`."""
    return w["e"] @ k, w.get("f", w["e"]) @ v


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: LinformerParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    keys, values = expand_heads(q, *_compressed(k, v, given(weights, draw, (q, k, v), params)))
    return attend(take(q, rows), keys, values, q.shape[-1] ** -0.5)


def experts(q: Tensor, k: Tensor, v: Tensor, params: LinformerParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One shared expert of width K."""
    keys, values = expand_heads(q, *_compressed(k, v, given(weights, draw, (q, k, v), params)))
    return FastWeights((Bank(w1=keys.unsqueeze(2), w2=values.unsqueeze(2), scale=q.shape[-1] ** -0.5),))


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: LinformerParams, *, weights: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG001
    """Projections summed in float32 over runs of tokens, then scaled_dot_product_attention over K keys."""
    return attend_few(q, project(weights["e"], k), project(weights.get("f", weights["e"]), v))


def cost(shape: Shape, params: LinformerParams) -> Cost:
    """2 K M (D + Dv) FLOP a key head to project, 2 K N (D + Dv) a query head to attend; the matrices are read once."""
    s, heads, kv_heads, width = shape, shape.batch * shape.heads, shape.batch * shape.kv_heads, shape.dim + shape.dim_v
    owned = (1 if params.share else 2) * params.rank * s.keys * (s.kv_heads if params.per_head else 1)
    flops = {
        "project": 2 * kv_heads * params.rank * s.keys * width,
        "score": 2 * heads * s.n * params.rank * s.dim,
        "attend": 2 * heads * s.n * params.rank * s.dim_v,
    }
    compressed = kv_heads * params.rank * width
    traffic = {"project": kv_heads * s.keys * width + owned + compressed, "attend": heads * s.n * width + compressed}
    return Cost.of(s, flops, extra=owned + compressed, traffic=traffic)


def budget(shape: Shape, _params: LinformerParams, units: int) -> dict[str, object]:
    """As many projected keys, at most one a key."""
    return {"rank": min(max(1, units), shape.keys)}


METHOD = Method(
    name="linformer",
    title="Linformer",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LEARNABLE_PROJECTION, Topology.ALL_TO_ONE),
    citation=Citation("Wang et al.", 2020, "Linformer: Self-Attention with Linear Complexity", "https://arxiv.org/abs/2006.04768", "arXiv"),
    params=LinformerParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True, no_causal="every projected key mixes all tokens, later ones too"),
    implementations=(
        Implementation("sdpa", "attnbench.methods.linformer:sdpa", Limits(cross=True), note="projections by runs of tokens, then SDPA"),
    ),
    weights=draw,
)
