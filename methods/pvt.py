"""PVT, spatial-reduction attention: keys and values of an image shrunk by strided convolutions before softmax attention.

With tokens on a grid, `k' = LayerNorm(conv(k))` and `v' = LayerNorm(conv(v))` by convolutions over all channels of all heads whose kernel
and stride are R, so that N / R^2 keys are left, and `o_i = sum_r softmax_r(q_i . k'_r / sqrt(D)) v'_r`.
Wang et al. 2021, equations 1 to 4, https://arxiv.org/abs/2102.12122. With `pool = P`, the linear form of PVTv2: averages over P x P cells,
a 1 x 1 convolution, LayerNorm and GELU, so that P^2 keys are left at any length. Wang et al. 2022, https://arxiv.org/abs/2106.13797.

Departures: the paper shrinks tokens x once and then projects them to keys and values; a function of q, k and v must shrink keys and
values, each by a convolution of its own, which doubles that part of the work. R is cut to a side of the grid that is shorter (1 x R on a
sequence); as in the authors' code, last rows and columns that fill no patch are left out. R = 1 is softmax attention, without convolution
or LayerNorm, as there. Keys have no LayerNorm shift but with `pool`: it would add one number to all scores of a query, and softmax cancels
it. `per_head` keeps heads apart, which the paper does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch.nn.functional import gelu, layer_norm

from attnbench.eager import attend, expand_heads, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, given, param
from attnbench.stages import stage
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._compressed import attend_few
from ._grid import GridParams
from ._landmarks import bins, pool
from ._patches import convolve, patches

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from attnbench.method import Weights

    from ._patches import Sides

EPS = 1e-5
"""of LayerNorm"""
_MOST = 1 << 31
"""numbers in the kernels: more would be 16 GiB when drawn"""


@dataclass(frozen=True, kw_only=True)
class PvtParams(GridParams):
    """How far keys and values are shrunk, and what the convolutions mix."""

    reduction: int = param(8, "kernel and stride of the convolutions, R: N / R^2 keys are left; unused with pool", unit="tokens", low=1)
    pool: int = param(0, "side of the grid of averages, P, in PVTv2's linear form: P^2 keys are left; 0 for strided convolutions", low=0)
    per_head: bool = param(False, "convolve and normalise the channels of each head apart, not those of all heads together")

    def problems(self, shape: Shape) -> list[str]:
        """Adds a kernel or a pooled grid larger than the grid."""
        found = super().problems(shape)
        if found:
            return found
        height, width = self.sides(shape.n)
        name, value = ("pool", self.pool) if self.pool else ("reduction", self.reduction)
        return [f"{name} = {value} exceeds both sides of the {height} x {width} grid: lower {name}"] if value > max(height, width) else []

    def fitted(self, shape: Shape) -> Self:
        """Clamps pool to the longer side of the grid, and reduction to half of it, which leaves at least two keys."""
        longer = max(self.sides(shape.n))
        return replace(super().fitted(shape), reduction=min(self.reduction, max(1, longer // 2)), pool=min(self.pool, longer))

    def kernel(self, n: int) -> Sides:
        """Height and width of a patch, each at most that of the grid."""
        height, width = self.sides(n)
        return (1, 1) if self.pool else (min(self.reduction, height), min(self.reduction, width))

    def source(self, n: int) -> Sides:
        """The grid that is convolved: the tokens, or their averages."""
        height, width = self.sides(n)
        return (min(self.pool, height), min(self.pool, width)) if self.pool else (height, width)

    def left(self, n: int) -> int:
        """Keys left."""
        (height, width), (r, s) = self.source(n), self.kernel(n)
        return (height // r) * (width // s)

    def shrinks(self, n: int) -> bool:
        """Whether there is anything to convolve."""
        return bool(self.pool) or self.kernel(n) != (1, 1)


def draw(shape: Shape, params: PvtParams, generator: torch.Generator) -> Weights:
    """For x of k and v, with C = Hkv D or Hkv Dv channels in G = 1 or Hkv groups: `x_conv [C, R, R, C/G]`, Conv2d's weight with the input
    channels last, `x_bias [C]`, LayerNorm's `x_scale [C]`, and `x_shift [C]` where it matters; nothing where nothing is convolved.

    As torch draws Conv2d: uniform within 1 / sqrt(inputs of an output). With `pool`, as PVTv2: normal of variance 2 / (C / G), no bias.
    """
    found: Weights = {}
    groups = shape.kv_heads if params.per_head else 1
    for name, dim in (("k", shape.dim), ("v", shape.dim_v)) if params.shrinks(shape.n) else ():
        channels = shape.kv_heads * dim
        size = (channels, *params.kernel(shape.n), channels // groups)
        bound = (size[1] * size[2] * size[3]) ** -0.5
        if params.pool:
            conv = torch.randn(size, generator=generator, dtype=torch.float64) * (2 * groups / channels) ** 0.5
            bias = torch.zeros(channels, dtype=torch.float64)
        else:
            conv, bias = (torch.rand(s, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(bound) for s in (size, channels))
        found |= {f"{name}_conv": conv, f"{name}_bias": bias, f"{name}_scale": torch.ones(channels, dtype=torch.float64)}
        if params.pool or name == "v":
            found[f"{name}_shift"] = torch.zeros(channels, dtype=torch.float64)
    return found


def _product(x: Tensor, weight: Tensor, sides: Sides) -> Tensor:
    """A convolution with stride R as a product of patches `[G, B P, C/G]`."""
    groups = x.shape[1] * x.shape[3] // weight.shape[3]
    rows = patches(x.contiguous(), sides, (weight.shape[1], weight.shape[2]), groups)
    return rows @ weight.reshape(groups, -1, rows.shape[2]).transpose(1, 2)


def _shrunk(x: Tensor, name: str, params: PvtParams, w: Mapping[str, Tensor], conv: Callable[..., Tensor] = _product) -> Tensor:
    """Keys or values left `[B, H, P, D]` of `x: [B, H, N, D]`."""
    n = x.shape[2]
    if not params.shrinks(n):
        return x
    sides = params.source(n)
    if params.pool:
        with stage("pool"):
            image = x.reshape(*x.shape[:2], *params.sides(n), x.shape[3])
            x = pool(pool(image, sides[1], 3), sides[0], 2).flatten(2, 3).to(x.dtype)
    out = conv(x, w[f"{name}_conv"], sides)
    bias, scale = (w[f"{name}_{part}"].view(out.shape[0], 1, -1) for part in ("bias", "scale"))
    out = layer_norm(out + bias, out.shape[-1:], eps=EPS)
    shift = w.get(f"{name}_shift")
    out = out * scale if shift is None else torch.addcmul(shift.view(scale.shape), out, scale)
    tokens = out.view(out.shape[0], x.shape[0], params.left(n), -1, x.shape[3]).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return gelu(tokens) if params.pool else tokens


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: PvtParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    w = given(weights, draw, (q, k, v), params)
    keys, values = expand_heads(q, _shrunk(k, "k", params, w), _shrunk(v, "v", params, w))
    return attend(take(q, rows), keys, values, q.shape[-1] ** -0.5)


def experts(q: Tensor, k: Tensor, v: Tensor, params: PvtParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One shared expert, as wide as there are keys left."""
    w = given(weights, draw, (q, k, v), params)
    keys, values = expand_heads(q, _shrunk(k, "k", params, w), _shrunk(v, "v", params, w))
    return FastWeights((Bank(w1=keys.unsqueeze(2), w2=values.unsqueeze(2), scale=q.shape[-1] ** -0.5),))


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: PvtParams, *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Patches copied and multiplied, again in the backward pass, then scaled_dot_product_attention over the keys left."""
    with stage("project"):
        keys, values = (_shrunk(x, name, params, weights or {}, convolve) for name, x in (("k", k), ("v", v)))
    return attend_few(q, keys, values)


def cost(shape: Shape, params: PvtParams) -> Cost:
    """2 P R^2 C^2 / G FLOP for each of k and v, 2 N P (D + Dv) a query head; the kernels are read once."""
    s, heads, left, width = shape, shape.batch * shape.heads, params.left(shape.n), shape.dim + shape.dim_v
    flops = {"score": 2 * heads * s.n * left * s.dim, "attend": 2 * heads * s.n * left * s.dim_v}
    compressed = s.batch * s.kv_heads * left * width
    traffic = {"attend": heads * s.n * width + compressed}
    owned = 0
    if params.shrinks(s.n):
        kernels = _kernel_size(s, params)
        owned = kernels + s.kv_heads * (3 * width - (0 if params.pool else s.dim))
        flops["project"] = 2 * s.batch * left * kernels
        read = s.batch * s.kv_heads * s.n * width
        traffic["project"] = (compressed if params.pool else read) + owned + compressed
        if params.pool:
            flops["pool"], traffic["pool"] = s.batch * s.kv_heads * width * _members(params, s.n), read + compressed
    return Cost.of(s, flops, extra=owned + compressed, traffic=traffic)


def _members(params: PvtParams, n: int) -> int:
    """Additions of a channel's averages: every token once for each cell of its row that it is in, then rows likewise."""
    (height, width), (rows, columns) = params.sides(n), params.source(n)
    across, down = (sum(b - a for a, b in bins(*pair)) for pair in ((width, columns), (height, rows)))
    return height * across + columns * down


def _kernel_size(shape: Shape, params: PvtParams) -> int:
    """Numbers in the two kernels."""
    groups, (r, t) = shape.kv_heads if params.per_head else 1, params.kernel(shape.n)
    return r * t * sum((shape.kv_heads * dim) ** 2 // groups for dim in (shape.dim, shape.dim_v)) if params.shrinks(shape.n) else 0


def _too_large(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    size = _kernel_size(shape, params) if isinstance(params, PvtParams) and not params.problems(shape) else 0
    return [f"kernels of {size:.1e} numbers: lower reduction, or set pool or per_head"] if size > _MOST else []


def budget(shape: Shape, params: PvtParams, units: int) -> dict[str, object]:
    """The reduction that leaves the nearest number of keys, the largest of several, or with `pool` the side of a grid of averages."""
    longer = max(params.sides(shape.n))
    if params.pool:
        return {"pool": min(max(1, round(units**0.5)), longer)}
    return {"reduction": min(range(1, longer + 1), key=lambda r: (abs(replace(params, reduction=r).left(shape.n) - units), -r))}


METHOD = Method(
    name="pvt",
    title="PVT",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LEARNABLE_PROJECTION, Topology.ALL_TO_ONE),
    citation=Citation(
        "Wang et al.",
        2021,
        "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
        "https://arxiv.org/abs/2102.12122",
        "ICCV",
    ),
    params=PvtParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(no_causal="a patch of the image holds earlier and later tokens", extra=_too_large),
    implementations=(Implementation("sdpa", "attnbench.methods.pvt:sdpa", note="convolutions as products of patches, then SDPA"),),
    weights=draw,
    couples_heads=True,
)
