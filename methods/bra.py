"""BRA, bi-level routing attention: the queries of a region read the tokens of the T regions that their mean query likes best.

The grid is cut into regions of n tokens. `a_rs = sum_h mean_{i in r} q_i . mean_{j in s} k_j` over all heads, `R_r = top-T_s a_rs`, and
`o_i = sum_{j in R(i)} softmax_{j in R(i)}(c q_i . k_j) v_j`, one softmax over the tokens of the regions that the region of i chose. Zhu et
al. 2023, "BiFormer", equations 2 to 6, https://arxiv.org/abs/2303.08810. As in the authors' code, `c = C^-1/2` with C the channels of
all heads together (`scale`), every head has the same routing, and none of it has a gradient. The depthwise convolution of v that the paper
adds to the output (LEPE, 5 x 5) is learned and off by default.

Departures: the paper has 7 x 7 regions whatever the image, here a region has a size, so that their number grows with the image; it is
the paper's at 56 x 56. Regions at the lower and right ends of a grid that regions do not divide are short, averaged over their true
size; the authors' two versions pad them with tokens that are attended to. Scores of regions are in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from attnbench.eager import attend, expand_heads, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.stages import stage
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._grid import from_map, to_map
from ._regions import LINE, RegionParams, Regions, at, region_means
from ._routed import implementation
from ._varlen import segment_reasons, varlen_reasons

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class BraParams(RegionParams):
    """Hyper-parameters of BRA; the default region is the paper's at 56 x 56 tokens, the default T that of its second stage."""

    region: int = param(64, "tokens in a region: on a grid a square number, 8 x 8 = 64", unit="tokens", low=1)
    topk: int = param(4, "regions that each region reads, T; all where there are fewer", unit="regions", low=1)
    scale: Literal["1/sqrt(c)", "1/sqrt(d)"] = param("1/sqrt(c)", "factor of q . k: of all channels as published, or of one head's")
    lepe: int = param(0, "side of the depthwise convolution of v that is added to the output; 0 adds none, the paper has 5", low=0)

    @property
    def size(self) -> int:
        """Tokens in a whole region."""
        return self.region

    def problems(self, shape: Shape) -> list[str]:
        """Adds a kernel that has no centre."""
        found = super().problems(shape)
        return [*found, f"lepe = {self.lepe} is even: give an odd side, or 0"] if self.lepe and self.lepe % 2 == 0 else found

    def factor(self, heads: int, dim: int) -> float:
        """c."""
        return 1 / sqrt(heads * dim if self.scale == "1/sqrt(c)" else dim)


def initial_weights(shape: Shape, params: BraParams, generator: torch.Generator) -> Weights:
    """`lepe_weight [C, 1, side, side]` and `lepe_bias [C]`, uniform within 1 / side, torch's default; none without `lepe`."""
    if not params.lepe:
        return {}
    channels, side = shape.heads * shape.dim_v, params.lepe
    sizes = {"lepe_weight": (channels, 1, side, side), "lepe_bias": (channels,)}
    return {name: (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1) / side for name, size in sizes.items()}


@torch.no_grad()
def choose(q: Tensor, k: Tensor, regions: Regions, params: BraParams) -> Tensor:
    """Regions `[B, E, T]` that each region reads, best first."""
    with stage("pool"):
        means = region_means(k, regions)
        queries, (keys, _) = region_means(q, regions), expand_heads(q, means, means)
    with stage("route"):
        scores = queries.transpose(1, 2).flatten(2) @ keys.transpose(1, 2).flatten(2).transpose(-1, -2)
        return scores.topk(min(params.topk, scores.shape[-1]), -1).indices


def convolution(v: Tensor, weights: Mapping[str, Tensor], sides: tuple[int, int]) -> Tensor:
    """LEPE `[B, H, N, Dv]`: each channel of `v: [B, Hkv, N, Dv]` convolved over the grid, with kernels of its own in every head."""
    weight = weights["lepe_weight"]
    v = v.repeat_interleave(weight.shape[0] // (v.shape[1] * v.shape[3]), 1)
    image = to_map(v, sides).reshape(v.shape[0], -1, *sides)
    mixed = conv2d(image, weight, weights["lepe_bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return from_map(mixed.reshape(-1, v.shape[3], *sides), v.shape[1])


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: BraParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition: regions that hold queries asked for are computed whole."""
    own = given(weights, initial_weights, (q, k, v), params)
    regions, n = Regions.of(params, q.shape[2], q.device), q.shape[2]
    wanted, places = regions.wanted(rows)
    tokens = regions.members[choose(q, k, regions, params)[:, wanted]].flatten(2)
    k, v = expand_heads(q, k, v)
    keys, values = (torch.stack([at(one[None], read)[0] for one, read in zip(x, tokens, strict=True)]) for x in (k, v))
    mask = (tokens >= 0)[:, None, :, None]
    out = attend(at(q, regions.members[wanted]), keys, values, params.factor(q.shape[1], q.shape[3]), mask)
    out = out.flatten(2, 3)[:, :, places]
    return out + take(convolution(v, own, params.sides(n)), rows) if params.lepe else out


def experts(q: Tensor, k: Tensor, v: Tensor, params: BraParams, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One expert a region; the queries of a region are routed together, in all heads alike."""
    own = given(weights, initial_weights, (q, k, v), params)
    regions, sides = Regions.of(params, q.shape[2], q.device), params.sides(q.shape[2])
    routes = choose(q, k, regions, params)[:, regions.owner].unsqueeze(1).expand(-1, q.shape[1], -1, -1)
    k, v = expand_heads(q, k, v)
    index = regions.members.expand(*q.shape[:2], -1, -1)
    bank = Bank(k, v, index, routes=routes, scale=params.factor(q.shape[1], q.shape[3]))
    return FastWeights((bank,), beside=(lambda at_rows: convolution(v, own, sides)[:, :, at_rows]) if params.lepe else None)


def cost(shape: Shape, params: BraParams) -> Cost:
    """2 E^2 C FLOP to score all pairs of regions, 2 (D + Dv) for each key read.

    Every query counts as reading T whole regions (at most M keys): an upper bound where some regions are short.
    """
    s, areas = shape, params.areas(shape.n)
    a, b = params.tile(s.n)
    count, heads = len(areas), s.batch * s.heads
    top = min(params.topk, count)
    read = heads * s.n * min(top * a * b, s.keys)
    channels = heads * s.n * s.dim_v if params.lepe else 0
    queries, keys = heads * s.n * s.dim, s.batch * s.kv_heads * s.keys
    flops = {
        "pool": queries + keys * s.dim,
        "route": 2 * heads * count * count * s.dim,
        "score": 2 * read * s.dim,
        "attend": 2 * read * s.dim_v,
        "project": 2 * params.lepe**2 * channels,
    }
    index, learned = 4 * s.batch * count * top, (params.lepe**2 + 1) * s.heads * s.dim_v if params.lepe else 0
    traffic = {
        "pool": queries + keys * s.dim,
        "route": 2 * heads * count * s.dim,
        "attend": heads * s.n * (s.dim + s.dim_v) + heads * count * min(top * a * b, s.keys) * (s.dim + s.dim_v),
        "project": 2 * channels + learned,
    }
    return Cost.of(
        s, flops, extra=learned, index_bytes=index, selection=("pool", "route"), traffic=traffic,
        index_traffic={"route": index, "attend": index},
    )  # fmt: skip


def budget(_shape: Shape, params: BraParams, units: int) -> dict[str, object]:
    """Regions of such a size that T of them hold as many keys, on a grid the square that comes nearest."""
    tokens = max(1, round(units / params.topk))
    return {"region": tokens if params.grid == LINE else max(1, round(sqrt(tokens))) ** 2}


def _varlen_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    assert isinstance(params, BraParams)
    return varlen_reasons(shape, params, dtype, device) + segment_reasons(shape.batch * len(params.areas(shape.n)), device)


def _pairs(shape: Shape, params: Params) -> int:
    assert isinstance(params, BraParams)
    (a, b), count = params.tile(shape.n), len(params.areas(shape.n))
    return shape.batch * count * min(params.topk, count) * a * b


METHOD = Method(
    name="bra",
    title="BRA",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.BLOCKS, Construction.LOCALITY_PRIOR, Topology.BLOCKS_TO_BLOCKS),
    citation=Citation(
        "Zhu et al.", 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", "https://arxiv.org/abs/2303.08810", "CVPR"
    ),
    params=BraParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(no_causal="regions are averaged over later tokens too"),
    weights=initial_weights,
    implementations=(
        implementation("attnbench.methods._bra:fused", _pairs, "a region's queries against the regions it chose, in fused kernels"),
        Implementation(
            "varlen",
            "attnbench.methods._bra:varlen",
            Limits(extra=_varlen_reasons),
            note="chosen regions copied side by side, variable-length flash attention over all heads",
        ),
    ),
    selective=True,
    couples_heads=True,
)
