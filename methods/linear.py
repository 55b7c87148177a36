"""Linear attention: a positive feature map in place of the softmax, so that keys and values fold into one matrix.

`o_i = phi(q_i) S / (phi(q_i) . z + eps)` with `phi(x) = elu(x) + 1`, `S = sum_j phi(k_j)^T v_j`, `z = sum_j phi(k_j)`, eps = 1e-6; causal:
the sums run over j <= i. Katharopoulos et al. 2020, "Transformers are RNNs", equations 5, 7, 9 and 10, https://arxiv.org/abs/2006.16236.
No 1/sqrt(D) scale. As in the authors' code, eps is added to the denominator. Sums are in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu

from attnbench.eager import causal_mask, expand_heads, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

EPS = 1e-6
"""added to the denominator"""


@dataclass(frozen=True, kw_only=True)
class LinearParams(Params):
    """Linear attention has no hyper-parameters of its own."""


def feature(x: Tensor) -> Tensor:
    """`phi(x) = elu(x) + 1` in at least float32."""
    return elu(wide(x)) + 1


def reference(q: Tensor, k: Tensor, v: Tensor, params: LinearParams, rows: Tensor | None = None) -> Tensor:
    """The definition; causal as the masked product `(phi(q) phi(k)^T) v`, row by row the same sums."""
    query, key, value = feature(take(q, rows)), feature(k), wide(v)
    if params.causal:
        key, value = expand_heads(q, key, value)
        weights = (query @ key.transpose(-1, -2)).masked_fill(~causal_mask(positions(q, rows), k.shape[2]), 0.0)
        return (weights @ value / (weights.sum(-1, keepdim=True) + EPS)).to(v.dtype)
    state, total = expand_heads(q, key.transpose(-1, -2) @ value, key.sum(2).unsqueeze(-1))
    return (query @ state / (query @ total + EPS)).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> FastWeights:
    """One shared expert with linear hidden units.

    Bidirectional: D compressed units, unit d with weights `z_d e_d` and `S_d / z_d`, so that hidden units sum to the denominator.
    Causal, where each query has sums of its own: one unit a token, `phi(k_j)` and `v_j`, the future hidden.
    """
    key, value = expand_heads(q, feature(k), wide(v))
    if params.causal:
        index = torch.arange(k.shape[2], device=k.device).expand(*q.shape[:2], 1, -1)
        bank = Bank(key, value, index, activation="linear", query_map=_queries, causal=True)
    else:
        total = key.sum(2).clamp(min=torch.finfo(key.dtype).tiny)
        state = key.transpose(-1, -2) @ value / total.unsqueeze(-1)
        bank = Bank(w1=torch.diag_embed(total).unsqueeze(2), w2=state.unsqueeze(2), activation="linear", query_map=_queries)
    return FastWeights((bank,), combine="linear", eps=EPS)


def _queries(q: Tensor, _rows: Tensor) -> Tensor:
    return feature(q)


def cost(shape: Shape, params: LinearParams) -> Cost:  # noqa: ARG001
    """2 M D Dv FLOP a key head for S, M D for z; 2 N D Dv a query head to read S, 2 N D for the denominator. Causal the same."""
    keys, queries = shape.batch * shape.kv_heads * shape.keys, shape.batch * shape.heads * shape.n
    flops = {
        "state": 2 * keys * shape.dim * shape.dim_v,
        "pool": keys * shape.dim,
        "read": 2 * queries * shape.dim * shape.dim_v,
        "normalise": 2 * queries * shape.dim,
    }
    state = shape.batch * shape.kv_heads * shape.dim * (shape.dim_v + 1)
    both = {"state": keys * (shape.dim + shape.dim_v) + state, "read": queries * (shape.dim + shape.dim_v) + state}
    return Cost.of(shape, flops, extra=state, recomputes=False, traffic=both)


def _causal_cross(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    unequal = params.causal and shape.keys != shape.n
    return [f"causal, needs as many keys as queries, not {shape.keys} for {shape.n}"] if unequal else []


METHOD = Method(
    name="linear",
    title="Linear",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation("Katharopoulos et al.", 2020, "Transformers are RNNs", "https://arxiv.org/abs/2006.16236", "ICML"),
    params=LinearParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True),
    implementations=(
        Implementation(
            "chunked",
            "attnbench.methods._linear:chunked",
            Limits(cross=True, extra=_causal_cross),
            note="segments of tokens; causal by prefix states of chunks",
        ),
    ),
)
