"""Deformable attention: a query says where on the grid to look, relative to itself, and how much each place counts.

`o_i = sum_p A_ip v(y_i + dy_ip, x_i + dx_ip)` over P points a head: offsets `d_i = W x_i + b` in tokens, weights
`A_i = softmax(W' x_i + b')` over the points, `v(y, x)` bilinear between tokens and zero beyond the grid, where nothing is renormalised.
Zhu et al. 2021, "Deformable DETR", equations 1 and 2, https://arxiv.org/abs/2010.04159. k is not used: no key says where a query looks.

Departures: one scale, the grid of the tokens, where the paper has four feature maps; `x_i`, in the paper the layer's input, is the queries
of all heads. As initialised, offsets are the paper's, P steps in a direction a head, and all points count alike, whatever the query: the
gathers of a trained layer are less regular. Projections and everything up to the sum over points are in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.eager import positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._grid import GridParams
from ._sampling import sample

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class DeformableParams(GridParams):
    """How many places a query reads."""

    points: int = param(4, "places that a query reads in each head, P", unit="points", low=1)


def initial_weights(shape: Shape, params: DeformableParams, generator: torch.Generator) -> Weights:  # noqa: ARG001
    """As in the paper, nothing is random: point p of head h lies p steps in direction `2 pi h / H`, scaled to a largest coordinate of 1."""
    h, p, width = shape.heads, params.points, shape.heads * shape.dim
    angle = torch.arange(h, dtype=torch.float64) * (2 * torch.pi / h)
    direction = torch.stack([angle.cos(), angle.sin()], -1)  # x, y
    direction = (direction / direction.abs().amax(-1, keepdim=True)).round(decimals=12)  # along an axis the other coordinate is 0
    offsets = direction[:, None] * torch.arange(1, p + 1, dtype=torch.float64)[:, None]
    zeros = {"offset_weight": (h, p, 2, width), "point_weight": (h, p, width), "point_bias": (h, p)}
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in zeros.items()} | {"offset_bias": offsets}


def project(q: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[B, H, R, *S]` of queries `[B, H, R, D]`, all heads of which `weight: [H, *S, H D]` reads; `bias: [H, *S]`."""
    tokens = wide(q).transpose(1, 2).flatten(2)
    mapped: Tensor = (tokens @ wide(weight).flatten(0, -2).T + wide(bias).flatten()).unflatten(-1, bias.shape)
    return mapped.transpose(1, 2)


def places(q: Tensor, rows: Tensor, params: DeformableParams, own: Mapping[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """Row and column `[B, H, R, P]` that the queries `[B, H, R, D]` at positions `rows` of N look at."""
    width = params.sides(n)[1]
    offsets = project(q, own["offset_weight"], own["offset_bias"])
    return (rows // width)[:, None] + offsets[..., 1], (rows % width)[:, None] + offsets[..., 0]


def logits(q: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Logits `[B, H, R, P]` of the points."""
    return project(q, own["point_weight"], own["point_bias"])


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: DeformableParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    own = given(weights, initial_weights, (q, k, v), params)
    rows, q, n = positions(q, rows), take(q, rows), q.shape[2]
    read = sample(v, *places(q, rows, params, own, n), params.sides(n))
    return (logits(q, own).softmax(-1).unsqueeze(-2) @ read)[..., 0, :].to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: DeformableParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One expert a query, P units wide: its values are sampled, its keys are the axes of the units, which a query's learned logits meet."""
    own = given(weights, initial_weights, (q, k, v), params)
    rows = positions(q, None)
    read = sample(v, *places(q, rows, params, own, q.shape[2]), params.sides(q.shape[2]))
    axes = torch.eye(params.points, dtype=read.dtype, device=q.device).expand(*read.shape[:4], -1)
    routes = rows.expand(*q.shape[:2], -1).unsqueeze(-1)
    return FastWeights((Bank(w1=axes, w2=read, routes=routes, query_map=lambda x, _: logits(x, own), sampled=True),))


def cost(shape: Shape, params: DeformableParams) -> Cost:
    """6 N H D P FLOP a head to project, 8 Dv for a value between four tokens and 2 Dv to weigh it. Keys are not read; four rows of v are
    gathered for each point."""
    s, heads = shape, shape.batch * shape.heads
    points = heads * s.n * params.points
    flops = {"project": 6 * points * s.heads * s.dim, "gather": 8 * points * s.dim_v, "attend": 2 * points * s.dim_v}
    learned, unread = 3 * s.heads * params.points * (s.heads * s.dim + 1), s.batch * s.kv_heads * s.keys * s.dim
    traffic = {
        "project": heads * s.n * s.dim + learned + 3 * points,
        "gather": 3 * points + 4 * points * s.dim_v,
        "attend": heads * s.n * s.dim_v,
    }
    return Cost.of(s, flops, extra=learned + 4 * points * s.dim_v - unread, traffic=traffic)


def budget(_shape: Shape, _params: DeformableParams, units: int) -> dict[str, object]:
    """As many points."""
    return {"points": units}


METHOD = Method(
    name="deformable",
    title="Deformable",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.TOKENS, Construction.OFFSET_PREDICTING, Topology.ONE_TO_ONE),
    citation=Citation(
        "Zhu et al.",
        2021,
        "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
        "https://arxiv.org/abs/2010.04159",
        "ICLR",
    ),
    params=DeformableParams,
    reference=reference,
    weights=initial_weights,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(no_causal="a query looks to all sides of itself"),
    couples_heads=True,
    implementations=(
        Implementation(
            "triton",
            "attnbench.methods._deformable:fused",
            Limits(("cuda",), ("bfloat16", "float16", "float32"), max_dim=256),
            requires=("triton",),
            operators=("attnbench::mix_rows",),
            note="rows of v gathered and summed in one kernel; their gradients added up atomically",
            stages={"gather": ("mix_rows_kernel",), "gather gradient": ("spread_rows_kernel",)},
        ),
        Implementation(
            "chunked",
            "attnbench.methods._deformable:chunked",
            note="places projected, and rows of v gathered, a chunk of queries at a time, again in the backward pass",
        ),
    ),
)
