"""cosFormer: linear attention with ReLU features whose weights fall off with distance as a cosine.

`o_i = sum_j w_ij v_j / max(sum_j w_ij, eps)` with `w_ij = (relu(q_i) . relu(k_j)) cos(pi (i - j) / 2M)`, `M = max(N, keys)`, eps = 1e-6.
The cosine of a difference is a product of features: `phi(x_i) = [relu(x_i) sin(pi i / 2M), relu(x_i) cos(pi i / 2M)]`, positions from
1. Qin et al. 2022, "cosFormer: Rethinking Softmax in Attention", equations 9 to 12, https://arxiv.org/abs/2202.08791. No 1/sqrt(D)
scale. As in the authors' code, eps is the least denominator, and M is the length of the call, causal too: what a token reads
does not change with later tokens, but its weights do with their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from attnbench.eager import expand_heads, positions, take, wide
from attnbench.fastweights import FastWeights
from attnbench.method import Citation, Cost, Limits, Method, Params, Shape
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _kernelised
from ._kernelised import Normaliser, causal_cross, implementations

if TYPE_CHECKING:
    from torch import Tensor

NORM = Normaliser(least=1e-6)


@dataclass(frozen=True, kw_only=True)
class CosformerParams(Params):
    """cosFormer has no hyper-parameters of its own."""


def angles(at: Tensor, length: int) -> Tensor:
    """`pi i / 2M` `[N, 1]` in float64 of the tokens at positions `at`, which count from 0."""
    return (at.double() + 1).mul_(math.pi / (2 * length)).unsqueeze(1)


def feature(x: Tensor, at: Tensor, length: int) -> Tensor:
    """`phi(x)`, `[B, H, N, 2 D]` in at least float32, of tokens at positions `at` of `length`."""
    x, angle = wide(x).relu(), angles(at, length)
    return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], -1)


def features(q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Features of the queries at `rows` of all of `q`, and of all keys."""
    length = max(q.shape[2], k.shape[2])
    return feature(take(q, rows), rows, length), feature(k, positions(k, None), length)


def reference(q: Tensor, k: Tensor, v: Tensor, params: CosformerParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    at = positions(q, rows)
    return _kernelised.attend(*features(q, k, at), wide(v), NORM, at if params.causal else None).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: CosformerParams) -> FastWeights:
    """One shared expert with linear hidden units: 2 D of them, or causal one a token."""
    key, value = expand_heads(q, features(q, k, positions(q, None))[1], wide(v))
    query_map = partial(feature, length=max(q.shape[2], k.shape[2]))
    return FastWeights((_kernelised.bank(query_map, key, value, causal=params.causal),), combine="linear", least=NORM.least)


def cost(shape: Shape, params: CosformerParams) -> Cost:  # noqa: ARG001
    """As linear attention with 2 D features for D. Causal the same."""
    return _kernelised.cost(shape, 2 * shape.dim)


METHOD = Method(
    name="cosformer",
    title="cosFormer",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation("Qin et al.", 2022, "cosFormer: Rethinking Softmax in Attention", "https://arxiv.org/abs/2202.08791", "ICLR"),
    params=CosformerParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True),
    implementations=implementations("cosformer", Limits(cross=True, extra=causal_cross), Limits(cross=True, max_dim=256)),
)
