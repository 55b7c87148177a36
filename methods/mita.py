"""MiTA: each query reads compressed landmarks and the top-k keys of the landmark nearest to it, in one softmax.

With landmarks `r_m` (adaptive averages of the queries) and `c = D^-1/2`:
`P = r k^T`, `T_m` the K largest of row m (an expert), `u_m = sum_j softmax_j(c P_mj) v_j`, `E_i` the S largest of `r q_i^T`,
`o_i = softmax over {q_i.r_m / D} and {c q_i.k_j : j in T_e, e in E_i}` of `u_m` and `v_j`.
Wen et al. 2026, https://arxiv.org/abs/2602.01219; landmark scale, class-token conventions and S > 1 after the authors' code,
https://github.com/QishuaiWen/MiTA. A key in several chosen experts counts once for each.

Departures: landmarks average along the sequence by default and over a grid on request; class and register tokens come first and are
left out of a grid (`legacy_cls_shift` is the authors' shifted grid); selection scores are at least float32; the authors' depthwise
convolution and gate belong to a layer, not to this operator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from attnbench.eager import expand_heads, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _fused
from ._landmarks import LandmarkParams, landmark_budget, landmarks, pool_flops
from ._varlen import segment_reasons, varlen_reasons

_ROWS = 1024  # queries evaluated at a time, each with keys of its own


@dataclass(frozen=True, kw_only=True)
class MitaParams(LandmarkParams):
    """Landmarks, experts and which of the two a query reads."""

    topk: int = param(25, "keys of one expert, K", unit="tokens", low=1, at_most="keys")
    experts_per_query: int = param(1, "experts that a query reads, S", low=1)
    shared: bool = param(True, "queries read the landmarks; False is route-only")
    routed: bool = param(True, "queries read experts; False is compress-only")
    shared_scale: Literal["1/d", "1/sqrt(d)"] = param("1/d", "factor of q.r for landmarks; `1/d` is the authors'")

    def problems(self, shape: Shape) -> list[str]:
        """Adds more experts a query than there are, and nothing to read."""
        found = super().problems(shape)
        if self.experts_per_query > self.landmarks:
            found.append(f"experts_per_query = {self.experts_per_query} exceeds landmarks = {self.landmarks}: lower experts_per_query")
        if not (self.shared or self.routed):
            found.append("shared and routed are both False, so queries read nothing: set one of them")
        return found

    def fitted(self, shape: Shape) -> Self:
        """Clamps the experts a query reads to the landmarks too."""
        fit = super().fitted(shape)
        return replace(fit, experts_per_query=min(fit.experts_per_query, fit.landmarks))

    def landmark_factor(self, dim: int) -> float:
        """The factor of `q . r`."""
        return 1 / dim if self.shared_scale == "1/d" else dim**-0.5


class _Weights(NamedTuple):
    """Fast weights that the landmarks make."""

    r: Tensor
    """`[B, H, M, D]` landmarks"""
    values: Tensor | None
    """`[B, H, M, Dv]` what landmarks read, where queries read landmarks"""
    members: Tensor | None
    """`[B, H, M, K]` tokens of each expert, where queries read experts"""


def _probe(q: Tensor, k: Tensor, v: Tensor, params: MitaParams) -> _Weights:
    r = landmarks(q, params)
    scores = wide(r) @ wide(k).transpose(-1, -2)
    values = (q.shape[-1] ** -0.5 * scores).softmax(-1).to(v.dtype) @ v if params.shared else None
    return _Weights(r, values, scores.topk(params.topk, -1).indices if params.routed else None)


def reference(q: Tensor, k: Tensor, v: Tensor, params: MitaParams, rows: Tensor | None = None) -> Tensor:
    """The definition. Gathers `S K` keys for each query asked for, some queries at a time."""
    k, v = expand_heads(q, k, v)
    weights = _probe(q, k, v, params)
    return torch.cat([_attend(take(q, part), k, v, weights, params) for part in positions(q, rows).split(_ROWS)], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, weights: _Weights, params: MitaParams) -> Tensor:
    """One softmax over landmarks and over the tokens of the experts chosen."""
    r, values, members = weights
    affinity = wide(q) @ wide(r).transpose(-1, -2)
    logits, read = [], []
    if values is not None:
        logits.append(params.landmark_factor(q.shape[-1]) * affinity)
        read.append(values.unsqueeze(2))
    if members is not None:
        chosen = affinity.topk(params.experts_per_query, -1).indices
        tokens = _pick(members, chosen.flatten(2)).reshape(*q.shape[:3], -1)
        keys, own = (_pick(x, tokens.flatten(2)).reshape(*tokens.shape, -1) for x in (k, v))
        logits.append(q.shape[-1] ** -0.5 * (wide(keys) @ wide(q).unsqueeze(-1)).squeeze(-1))
        read.append(own)
    shares = torch.cat(logits, -1).softmax(-1).to(v.dtype).split([x.shape[3] for x in read], -1)
    return torch.stack([_mix(share, x) for share, x in zip(shares, read, strict=True)]).sum(0)


def _mix(shares: Tensor, values: Tensor) -> Tensor:
    """`shares: [B, H, R, W]` times `values: [B, H, 1 or R, W, Dv]` -> `[B, H, R, Dv]`."""
    if values.shape[2] != shares.shape[2]:
        return shares @ values.squeeze(2)
    return (shares.unsqueeze(-2) @ values).squeeze(-2)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index: [B, H, I]` of `x: [B, H, M, W]` -> `[B, H, I, W]`."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def experts(q: Tensor, k: Tensor, v: Tensor, params: MitaParams) -> FastWeights:
    """A shared expert of landmarks and their values, and M routed experts of K tokens."""
    k, v = expand_heads(q, k, v)
    r, values, members = _probe(q, k, v, params)
    banks = []
    if values is not None:
        banks.append(Bank(w1=r.unsqueeze(2), w2=values.unsqueeze(2), scale=params.landmark_factor(q.shape[-1])))
    if members is not None:
        routes = (wide(q) @ wide(r).transpose(-1, -2)).topk(params.experts_per_query, -1).indices
        banks.append(Bank(k, v, members, routes=routes, scale=q.shape[-1] ** -0.5))
    return FastWeights(tuple(banks))


def cost(shape: Shape, params: MitaParams) -> Cost:
    """2 N D (4 M + 2 S K) FLOP a head where Dv = D: the scores of probe and routing are used twice, not made twice."""
    s, m, heads = shape, params.landmarks, shape.batch * shape.heads
    read = params.experts_per_query * params.topk
    flops = {"pool": pool_flops(s, params), "probe": 2 * heads * m * s.keys * s.dim, "route": 2 * heads * s.n * m * s.dim, "attend": 0}
    extra = index = 0
    if params.shared:
        flops |= {"compress": 2 * heads * m * s.keys * s.dim_v, "attend": 2 * heads * s.n * m * s.dim_v}
        extra += heads * m * (s.dim + s.dim_v)
    if params.routed:
        flops["attend"] += 2 * heads * s.n * read * (s.dim + s.dim_v)
        extra += heads * m * params.topk * (s.dim + s.dim_v)
        index = 4 * heads * (m * params.topk + s.n * params.experts_per_query)
    choosing = ("select", "permute") if params.shared else ("pool", "probe", "route", "select", "permute")
    elements, indices = _traffic(s, params, extra)
    return Cost.of(s, flops, extra=extra, index_bytes=index, selection=choosing, traffic=elements, index_traffic=indices)


def _traffic(s: Shape, params: MitaParams, gathered: int) -> tuple[dict[str, int], dict[str, int]]:
    """Elements and bytes of indices a stage; landmarks and experts are read once a head, the number of an expert is a byte."""
    m, heads, kv_heads = params.landmarks, s.batch * s.heads, s.batch * s.kv_heads
    elements = {
        "pool": heads * (s.n + m) * s.dim,
        "probe": (heads * m + kv_heads * s.keys) * s.dim,
        "compress": (heads * m + kv_heads * s.keys) * s.dim_v if params.shared else 0,
        "route": heads * (s.n + m) * s.dim,
        "attend": heads * s.n * (s.dim + s.dim_v) + gathered,
    }
    pairs, members = (heads * s.n * params.experts_per_query, 4 * heads * m * params.topk) if params.routed else (0, 0)
    return elements, {"select": members, "route": pairs, "permute": 5 * pairs, "attend": 4 * pairs + members}


def budget(_shape: Shape, params: MitaParams, units: int) -> dict[str, object]:
    """Half for landmarks and half for the keys of experts; where queries read one of the two alone, all for that one."""
    if not params.routed:
        return {"landmarks": landmark_budget(params, units)}
    landmarks = landmark_budget(params, units // 2)
    keys = units - landmarks if params.shared else units
    return {"landmarks": landmarks, "topk": max(1, round(keys / params.experts_per_query))}


def _varlen_limits(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    assert isinstance(params, MitaParams)
    segments = shape.batch * shape.heads * (params.landmarks if params.routed else 1)
    return varlen_reasons(shape, params, dtype, device) + segment_reasons(segments, device)


METHOD = Method(
    name="mita",
    title="MiTA",
    coordinates=Coordinates(Scaling.BOTH, Expert.MLP, Count.LANDMARKS, Construction.LANDMARK_PROBING, Topology.N_TO_M),
    citation=Citation(
        "Wen et al.",
        2026,
        "MiTA Attention: Efficient Fast-Weight Scaling via a Mixture of Top-k Activations",
        "https://arxiv.org/abs/2602.01219",
    ),
    params=MitaParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True, no_causal="landmarks average later queries and experts hold later keys"),
    implementations=(
        _fused.implementation("mita"),
        Implementation(
            "varlen",
            "attnbench.methods._mita_varlen:varlen",
            Limits(cross=True, no_graph="the lengths of the experts' segments are read back from the device", extra=_varlen_limits),
            note="queries sorted by expert; variable-length flash attention on CUDA, a loop over experts elsewhere",
        ),
    ),
    selective=True,
)
