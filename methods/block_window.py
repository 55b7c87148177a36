"""Window attention: the tokens of a grid, or of a sequence, attend inside windows that do not overlap.

`o_i = sum_{j in W(i)} softmax_{j in W(i)}(q_i . k_j / sqrt(D) + b_{y(i) - y(j), x(i) - x(j)}) v_j`, W(i) the window of token i. Liu et al.
2021, "Swin Transformer", equation 4 and section 3.2, https://arxiv.org/abs/2103.14030. The learned relative position bias b, one value
a head and offset, is off by default (`bias`). With `grid = line` windows are runs of a sequence; then there is a causal form too.

Departures: windows are not shifted from layer to layer, which is the business of two layers, not of one operator. Where windows do
not divide the grid, those at its lower and right ends are short; the authors' code pads the image, and its padding is attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.eager import expand_heads, masked_softmax
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._regions import LINE, RegionParams, Regions, at, share_reason
from ._routed import implementation

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_WINDOWS = 65535  # windows are an axis of a CUDA grid
_STD = 0.02  # of the authors' initial biases


@dataclass(frozen=True, kw_only=True)
class BlockWindowParams(RegionParams):
    """Hyper-parameters of window attention; the default window is the paper's, 7 x 7."""

    window: int = param(49, "tokens in a window: on a grid a square number, 7 x 7 = 49", unit="tokens", low=1)
    bias: bool = param(False, "add a learned bias for each head and relative position to the logits")

    @property
    def size(self) -> int:
        """Tokens in a whole window."""
        return self.window

    def problems(self, shape: Shape) -> list[str]:
        """Adds a causal form on a grid."""
        found = super().problems(shape)
        return [*found, "causal needs grid = line: a grid has no order"] if self.causal and self.grid != LINE else found


def initial_weights(shape: Shape, params: BlockWindowParams, generator: torch.Generator) -> Weights:
    """`bias [H, 2a - 1, 2b - 1]` for windows of a x b tokens, normal with deviation 0.02 cut off at two of them; none without `bias`."""
    if not params.bias:
        return {}
    a, b = params.tile(shape.n)
    table = torch.empty(shape.heads, 2 * a - 1, 2 * b - 1, dtype=torch.float64)
    return {"bias": torch.nn.init.trunc_normal_(table, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)}


def pair_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Bias `[H, W, W]` of each query and key of a window of height x width tokens, from `table: [H, 2a - 1, 2b - 1]`."""
    place = torch.arange(height * width, device=table.device)
    y, x = place // width, place % width
    down, across = y[:, None] - y + table.shape[1] // 2, x[:, None] - x + table.shape[2] // 2
    return table[:, down, across]


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: BlockWindowParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition: windows that hold queries asked for are computed whole."""
    own = given(weights, initial_weights, (q, k, v), params)
    k, v = expand_heads(q, k, v)
    regions = Regions.of(params, q.shape[2], q.device)
    windows, places = regions.wanted(rows)
    tokens = regions.members[windows]
    queries, keys, values = (at(x, tokens) for x in (q, k, v))
    logits = q.shape[-1] ** -0.5 * (queries @ keys.transpose(-1, -2))
    if params.bias:
        logits = logits + pair_bias(own["bias"], *params.tile(q.shape[2])).unsqueeze(1)
    mask = tokens[:, None, :] >= 0
    if params.causal:
        mask = mask & (tokens[:, None, :] <= tokens[:, :, None])
    return (masked_softmax(logits, mask).to(v.dtype) @ values).flatten(2, 3)[:, :, places]


def experts(q: Tensor, k: Tensor, v: Tensor, params: BlockWindowParams, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One expert a window, each query routed to that of its own; the bias is the query's own too."""
    own = given(weights, initial_weights, (q, k, v), params)
    k, v = expand_heads(q, k, v)
    regions = Regions.of(params, q.shape[2], q.device)
    index = regions.members.expand(*q.shape[:2], -1, -1)
    routes = regions.owner[:, None].expand(*q.shape[:2], -1, 1)
    inside = regions.place % regions.width
    bias = pair_bias(own["bias"], *params.tile(q.shape[2]))[None, :, inside] if params.bias else None
    return FastWeights((Bank(k, v, index, routes=routes, scale=q.shape[-1] ** -0.5, bias=bias, causal=params.causal),))


def cost(shape: Shape, params: BlockWindowParams) -> Cost:
    """2 P (D + Dv) FLOP a head, P the pairs inside windows: the sum of their squared sizes; causal n (n + 1) / 2 of each."""
    areas = params.areas(shape.n)
    pairs = sum(n * (n + 1) // 2 if params.causal else n * n for n in areas)
    heads = shape.batch * shape.heads
    a, b = params.tile(shape.n)
    table = shape.heads * (2 * a - 1) * (2 * b - 1) if params.bias else 0
    io = heads * shape.n * (shape.dim + shape.dim_v) + shape.batch * shape.kv_heads * shape.keys * (shape.dim + shape.dim_v)
    flops = {"score": 2 * heads * pairs * shape.dim, "attend": 2 * heads * pairs * shape.dim_v}
    return Cost.of(shape, flops, extra=table, traffic={"permute": 2 * io, "attend": io + table})


def budget(shape: Shape, params: BlockWindowParams, units: int) -> dict[str, object]:
    """Windows of such a size that a token's holds as many keys, on a grid the square that comes nearest."""
    if params.grid == LINE:
        return {"window": units}
    candidates = [replace(params, window=side**2) for side in range(1, isqrt(4 * units) + 1)]
    best = min(candidates, key=lambda p: abs(sum(n * n for n in p.areas(shape.n)) / shape.n - units))
    return {"window": best.window}


def _sdpa_reasons(shape: Shape, params: Params, _dtype: torch.dtype, device: str) -> list[str]:
    return share_reason(params, shape, _MOST_WINDOWS, device)


def _pairs(shape: Shape, params: Params) -> int:
    assert isinstance(params, BlockWindowParams)
    a, b = params.tile(shape.n)
    return shape.batch * len(params.areas(shape.n)) * a * b


def _refused(_shape: Shape, params: Params) -> list[str]:
    assert isinstance(params, BlockWindowParams)
    return ["the fused kernels add no biases"] if params.bias else []


METHOD = Method(
    name="block_window",
    title="Block window",
    coordinates=Coordinates(Scaling.ROUTING, Expert.MLP, Count.BLOCKS, Construction.LOCALITY_PRIOR, Topology.BLOCKS_TO_BLOCKS),
    citation=Citation(
        "Liu et al.",
        2021,
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "https://arxiv.org/abs/2103.14030",
        "ICCV",
    ),
    params=BlockWindowParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    weights=initial_weights,
    implementations=(
        implementation("attnbench.methods._block_window:fused", _pairs, "tokens of a window gathered in fused kernels", _refused),
        Implementation(
            "sdpa",
            "attnbench.methods._block_window:sdpa",
            Limits(extra=_sdpa_reasons),
            note="windows of one size as one batch of scaled_dot_product_attention",
        ),
    ),
)
