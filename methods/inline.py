"""InLine, injective linear attention: weights that sum to one by subtraction, not by division.

`o_i = sum_j (c q_i . k_j + 1 - c q_i . kbar) v_j / M = vbar + c q_i Cov(k, v)` with means `kbar` and `vbar`, `c = D^-1/2`, and
`Cov(k, v) = mean_j (k_j - kbar)^T (v_j - vbar)`: an affine map of the query, in which tokens may weigh less than nothing, and which tells
apart queries that differ in length alone. Han et al. 2024, "Bridging the Divide", equations 5 and 6, https://arxiv.org/abs/2412.06590.

`kernel` maps queries and keys first, by the identity as in the authors' models or by the other maps in their code. Their layer also adds
a convolution of v, 3 x 3 and depthwise, whose kernels a small network makes of the mean token: `conv = 3` turns it on. It is off by default
since it is a local module beside the attention, not a part of it.

Departures: the network reads the mean query, since a function of q, k and v has no tokens x; every token is on the grid (a class token
is the business of a layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import gelu, leaky_relu, relu

from attnbench.eager import expand_heads, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Shape, given, param
from attnbench.stages import stage
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._depthwise import depthwise
from ._grid import GridParams
from ._inline import affine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Weights


@dataclass(frozen=True, kw_only=True)
class InlineParams(GridParams):
    """Feature map, and the local convolution."""

    kernel: Literal["identity", "relu", "leakyrelu", "exp"] = param("identity", "map of queries and keys; `exp` is exp(x / 5)")
    conv: int = param(0, "side of the dynamic depthwise convolution of v over the grid; 0 adds none, the paper's layer has 3", low=0)

    def problems(self, shape: Shape) -> list[str]:
        """Adds a convolution without a centre, or over keys that are not the queries' tokens."""
        found = super().problems(shape)
        if self.conv and self.conv % 2 == 0:
            found.append(f"conv = {self.conv} is even: give an odd side, or 0")
        if self.conv and shape.keys != shape.n:
            found.append(f"conv needs as many keys as queries, not {shape.keys} for {shape.n}: set conv = 0")
        return found


def feature(x: Tensor, params: InlineParams) -> Tensor:
    """The feature map."""
    match params.kernel:
        case "identity":
            return x
        case "relu":
            return relu(x)
        case "leakyrelu":
            return leaky_relu(x)
        case "exp":
            return (x / 5).exp()


def draw(shape: Shape, params: InlineParams, generator: torch.Generator) -> Weights:
    """The network of each head that makes its kernels, drawn as torch draws Conv1d, uniform within 1/sqrt(D): `conv_in [H, D, D]`,
    `conv_in_bias [H, D]`, `conv_out [H, Dv S S, D]`, `conv_out_bias [H, Dv S S]`; nothing where `conv = 0`."""
    taps = shape.dim_v * params.conv**2
    sizes = {"conv_in": (shape.dim, shape.dim), "conv_in_bias": (shape.dim,), "conv_out": (taps, shape.dim), "conv_out_bias": (taps,)}
    bound = shape.dim**-0.5
    return {
        name: torch.rand(shape.heads, *size, generator=generator, dtype=torch.float64).mul_(2).sub_(1).mul_(bound)
        for name, size in (sizes if params.conv else {}).items()
    }


def local(q: Tensor, v: Tensor, params: InlineParams, w: Mapping[str, Tensor]) -> Tensor:
    """The convolution of v `[B, H, N, Dv]` with kernels `W' GELU(W mean(q) + b) + b'` of each head and input."""
    hidden = gelu(torch.einsum("hed,bhd->bhe", w["conv_in"], q.mean(2)) + w["conv_in_bias"])
    kernel = torch.einsum("hed,bhd->bhe", w["conv_out"], hidden) + w["conv_out_bias"]
    return depthwise(expand_heads(q, v, v)[1], kernel.unflatten(2, (-1, params.conv, params.conv)), params.sides(v.shape[2]))


def _state(k: Tensor, v: Tensor, params: InlineParams) -> tuple[Tensor, Tensor]:
    """`Cov [B, Hkv, D, Dv]` and `vbar [B, Hkv, 1, Dv]`; as in the authors' code each side is divided by the square root of M."""
    key, mean, share = feature(k, params), v.mean(2, keepdim=True), k.shape[2] ** -0.5
    return ((key - key.mean(2, keepdim=True)) * share).transpose(-1, -2) @ ((v - mean) * share), mean


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: InlineParams, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    covariance, mean = expand_heads(q, *_state(k, v, params))
    out: Tensor = mean + q.shape[-1] ** -0.5 * (feature(take(q, rows), params) @ covariance)
    if params.conv:
        out = out + take(local(q, v, params, given(weights, draw, (q, k, v), params)), rows)
    return out


def experts(q: Tensor, k: Tensor, v: Tensor, params: InlineParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One shared affine layer, D linear units that write Cov and one that is always 1 and writes vbar; the convolution beside it."""
    covariance, mean = expand_heads(q, *_state(k, v, params))
    w2 = torch.cat([covariance, mean], 2).unsqueeze(2)
    w1 = torch.eye(w2.shape[3], dtype=w2.dtype, device=w2.device).expand(*w2.shape[:4], -1)
    bank = Bank(w1=w1, w2=w2, activation="linear", query_map=partial(_queries, params=params))
    beside = partial(take, local(q, v, params, given(weights, draw, (q, k, v), params))) if params.conv else None
    return FastWeights((bank,), combine="sum", beside=beside)


def _queries(q: Tensor, _rows: Tensor, params: InlineParams) -> Tensor:
    scaled = q.shape[-1] ** -0.5 * feature(q, params)
    return torch.cat([scaled, torch.ones_like(scaled[..., :1])], -1)


def products(q: Tensor, k: Tensor, v: Tensor, params: InlineParams, *, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sums of outer products in float32 over runs of tokens and an affine map; the convolution by conv2d."""
    out = affine(feature(q, params), feature(k, params), v)
    if not params.conv:
        return out
    with stage("project"):
        return out + local(q, v, params, weights or {})


def cost(shape: Shape, params: InlineParams) -> Cost:
    """2 M D Dv FLOP a key head for Cov, M (D + Dv) additions for means, 2 N D Dv a query head to read, 2 S^2 N Dv to convolve."""
    s, heads, kv_heads, width = shape, shape.batch * shape.heads, shape.batch * shape.kv_heads, shape.dim + shape.dim_v
    flops = {"pool": kv_heads * s.keys * width, "state": 2 * kv_heads * s.keys * s.dim * s.dim_v, "read": 2 * heads * s.n * s.dim * s.dim_v}
    state = kv_heads * s.dim_v * (s.dim + 1)
    traffic = {"state": kv_heads * s.keys * width + state, "read": heads * s.n * width + state}
    owned, taps = 0, s.dim_v * params.conv**2
    if params.conv:
        owned = s.heads * (s.dim + taps) * (s.dim + 1)
        flops["pool"] += heads * s.n * s.dim
        flops["project"] = 2 * heads * (s.dim * (s.dim + taps) + s.n * taps)
        traffic["project"] = heads * s.n * (s.dim + s.dim_v) + kv_heads * s.keys * s.dim_v + owned
    return Cost.of(s, flops, extra=state + owned, recomputes=False, traffic=traffic)


METHOD = Method(
    name="inline",
    title="InLine",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation(
        "Han et al.", 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention", "https://arxiv.org/abs/2412.06590", "NeurIPS"
    ),
    params=InlineParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True, no_causal="keys and values are centred by means over all tokens"),
    implementations=(
        Implementation("products", "attnbench.methods.inline:products", Limits(cross=True), note="sums of outer products, an affine map"),
    ),
    weights=draw,
)
