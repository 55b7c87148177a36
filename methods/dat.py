"""DAT, deformable attention transformer: the queries say together where to sample keys and values, and all of a group read those points.

On a grid of tokens, a small network on the queries of a group of heads predicts the offsets of N_s points from a coarse grid of references;
`k~, v~` are k and v there, bilinear between tokens: `o_i = softmax(q_i k~^T / sqrt(D) + b_i) v~`. With `bias` (off here, on in the paper),
`b_is` is read, bilinear too, from a learned table of displacements between query and point. Xia et al. 2022, "Vision Transformer with
Deformable Attention", equations 2 to 8, https://arxiv.org/abs/2201.00520, and 2023, "DAT++", https://arxiv.org/abs/2309.01430.

Strides are those of DAT++: its stages of 56, 28, 14 and 7 tokens a side have strides 8, 4, 2, 1, kernels 9, 7, 5, 3, and so 7 x 7 points
each; `stride = 0` takes the least stride that leaves no more than `points`. Offsets are bounded as in DAT++: positions are clamped to the
grid (`reach = -1`); DAT had `reach = 2` steps of the coarse grid. References are those of the authors' code since 2023, or of 2022.
Departures: the paper samples the layer's input and maps it to keys and values, which without a bias, and inside the grid, is the same;
a side of one point has its reference in the middle, where the authors' code divides by zero. What leads to a point is in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor
from torch.nn.init import trunc_normal_

from attnbench.eager import masked_softmax, positions, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._grid import GridParams
from ._offsets import Sides, coordinates, offsets, points_of
from ._sampling import sample

if TYPE_CHECKING:
    from collections.abc import Mapping

_KERNELS = {1: 3, 2: 5, 4: 7, 8: 9}  # of DAT++, by stride


@dataclass(frozen=True, kw_only=True)
class DatParams(GridParams):
    """Where points lie and how many there are."""

    group_heads: int = param(2, "heads that share one set of points: 2 at every stage of DAT++-T, 3 in DAT-T", unit="heads", low=1)
    points: int = param(49, "most points N_s, where the stride is not given", unit="points", low=1)
    stride: int = param(
        0, "tokens from one reference to the next; 0 takes the least that leaves no more than `points`", unit="tokens", low=0
    )
    kernel: int = param(0, "side of the offset network's convolution; 0 follows DAT++, the stride and a little more", unit="tokens", low=0)
    reach: float = param(-1.0, "how far offsets go, in steps between references; below 0 anywhere on the grid")
    release: Literal["2023", "2022"] = param("2023", "the authors' references and bounds: of their code since 2023, or of 2022")
    bias: bool = param(False, "add a learned bias by displacement to the logits; its table grows with the grid")

    def strides(self, n: int) -> tuple[int, int]:
        """Stride and kernel for N tokens."""
        stride = self.stride or next(r for r in range(1, n + 1) if _ceil_area(self.sides(n), r) <= self.points)
        return stride, self.kernel or _KERNELS.get(stride, stride + 1 + stride % 2)

    def counts(self, n: int) -> Sides:
        """Points along height and width."""
        stride, kernel = self.strides(n)
        return points_of(self.sides(n), kernel, stride)

    def problems(self, shape: Shape) -> list[str]:
        """Adds heads that make no groups, and a kernel larger than the grid."""
        found = super().problems(shape)
        if self.group_heads > 0 and shape.heads % self.group_heads:
            found.append(f"group_heads = {self.group_heads} does not divide the {shape.heads} heads: change group_heads")
        if not found and min(self.counts(shape.n)) < 1:
            found.append(
                f"kernel = {self.kernel} as large as the stride does not fit the grid {self.sides(shape.n)}: lower kernel and stride"
            )
        return found

    def fitted(self, shape: Shape) -> Self:
        """Groups of the next number of heads that divides all of them."""
        fits = (h for h in range(min(self.group_heads, shape.heads), shape.heads + 1) if shape.heads % h == 0)
        return replace(super().fitted(shape), group_heads=next(fits))


def _ceil_area(sides: Sides, stride: int) -> int:
    return -(-sides[0] // stride) * -(-sides[1] // stride)


def initial_weights(shape: Shape, params: DatParams, generator: torch.Generator) -> Weights:
    """As the authors' code: torch's defaults for convolutions, uniform within the inverse root of a sum's length; the table N(0, 0.01)."""
    group, d, kernel = params.group_heads, shape.dim, params.strides(shape.n)[1]

    def uniform(inputs: int, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)

    drawn = {
        "conv_weight": uniform(kernel**2, group, d, kernel, kernel),
        "conv_bias": uniform(kernel**2, group, d),
        "norm_weight": torch.ones(group * d, dtype=torch.float64),
        "norm_bias": torch.zeros(group * d, dtype=torch.float64),
        "offset_weight": uniform(group * d, 2, group * d),
    }
    if params.bias:
        height, width = params.sides(shape.n)
        table = torch.empty(shape.heads, 2 * height - 1, 2 * width - 1, dtype=torch.float64)
        drawn["table"] = trunc_normal_(table, std=0.01, generator=generator)
    return drawn


def places(q: Tensor, params: DatParams, own: Mapping[str, Tensor]) -> Tensor:
    """Positions `[B, H, N_s, 2]` that the heads of a group share, in coordinates."""
    n = q.shape[2]
    found = offsets(q, params.sides(n), params.strides(n)[0], own)
    return coordinates(found, params.reach, params.release).flatten(2, 3).repeat_interleave(params.group_heads, 1)


def on_grid(place: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """Row and column, in tokens, of positions `[.., 2]` in coordinates: -1 is the first token, 1 the last."""
    return (place[..., 0] + 1) * ((sides[0] - 1) / 2), (place[..., 1] + 1) * ((sides[1] - 1) / 2)


def displacements(rows: Tensor, place: Tensor, params: DatParams, n: int) -> tuple[Tensor, Tensor]:
    """Row and column `[B, H, R, N_s]` of the bias table for queries at positions `rows` of N and points at `place`."""
    height, width = params.sides(n)
    row, column = (x[:, None].to(place.dtype) for x in (rows // width, rows % width))
    if params.release == "2022":  # queries at the centres of cells, points on a scale from the first token to the last
        row, column = (row + 0.5) * (height - 1) / height, (column + 0.5) * (width - 1) / width
    y, x = on_grid(place.unsqueeze(2), (height, width))
    return row - y + height - 1, column - x + width - 1


def biases(rows: Tensor, place: Tensor, table: Tensor, params: DatParams, n: int) -> Tensor:
    """Biases `[B, H, R, N_s]` from the table `[H, 2 h - 1, 2 w - 1]`."""
    tokens = table.flatten(1).unsqueeze(-1).expand(len(place), -1, -1, -1)
    return sample(tokens, *displacements(rows, place, params, n), (table.shape[1], table.shape[2])).squeeze(-1)


def sampled(x: Tensor, place: Tensor, sides: Sides) -> Tensor:
    """Keys or values `[B, H, N_s, D]` at the points, in the dtype of x."""
    return sample(x, *on_grid(place, sides), sides).to(x.dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: DatParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    own, n = given(weights, initial_weights, (q, k, v), params), q.shape[2]
    place = places(q, params, own)
    keys, values = (sampled(x, place, params.sides(n)) for x in (k, v))
    logits = q.shape[-1] ** -0.5 * wide(take(q, rows) @ keys.transpose(-1, -2))
    if params.bias:
        logits = logits + biases(positions(q, rows), place, own["table"], params, n)
    return masked_softmax(logits).to(v.dtype) @ values


def experts(q: Tensor, k: Tensor, v: Tensor, params: DatParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One expert a head, N_s units wide, sampled between tokens."""
    own, n = given(weights, initial_weights, (q, k, v), params), q.shape[2]
    place = places(q, params, own)
    w1, w2 = (sampled(x, place, params.sides(n)).unsqueeze(2) for x in (k, v))
    bias = biases(positions(q, None), place, own["table"], params, n) if params.bias else None
    return FastWeights((Bank(w1=w1, w2=w2, scale=q.shape[-1] ** -0.5, bias=bias, sampled=True),))


def cost(shape: Shape, params: DatParams) -> Cost:
    """2 N_s D (S^2 + 2) FLOP a head for offsets, S the kernel; 8 D for a key and 8 Dv for a value between four tokens, 8 for a bias;
    2 N N_s (D + Dv) to read them. Four rows of k and of v are gathered for each point."""
    s, heads, kernel = shape, shape.batch * shape.heads, params.strides(shape.n)[1]
    height, width = params.counts(s.n)
    points = heads * height * width
    flops = {
        "project": 2 * points * s.dim * (kernel**2 + 2),
        "gather": 8 * points * (s.dim + s.dim_v),
        "score": (2 * s.dim + (8 if params.bias else 0)) * points * s.n,
        "attend": 2 * points * s.n * s.dim_v,
    }
    units, (rows, columns) = points * (s.dim + s.dim_v), params.sides(s.n)
    table = s.heads * (2 * rows - 1) * (2 * columns - 1) if params.bias else 0
    learned = params.group_heads * s.dim * (kernel**2 + 5) + table
    unread = s.batch * s.kv_heads * s.keys * (s.dim + s.dim_v)  # of k and v only the points are read
    traffic = {"project": heads * s.n * s.dim, "gather": 5 * units, "attend": heads * s.n * (s.dim + s.dim_v) + units}
    return Cost.of(s, flops, extra=learned + 5 * units - unread, traffic=traffic)


def budget(_shape: Shape, _params: DatParams, units: int) -> dict[str, object]:
    """At most as many points."""
    return {"points": units, "stride": 0}


METHOD = Method(
    name="dat",
    title="DAT",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.SHARED, Construction.OFFSET_PREDICTING, Topology.N_TO_ONE),
    citation=Citation("Xia et al.", 2022, "Vision Transformer with Deformable Attention", "https://arxiv.org/abs/2201.00520", "CVPR"),
    params=DatParams,
    reference=reference,
    weights=initial_weights,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(no_causal="all queries together say where points lie"),
    couples_heads=True,
    implementations=(
        Implementation(
            "sdpa",
            "attnbench.methods._dat:sdpa",
            note="points gathered, then scaled_dot_product_attention; with a bias a chunk of queries at a time",
        ),
    ),
)
