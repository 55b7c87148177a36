"""Focused linear attention (FLatten): features sharpened by a power that keeps their length, so that similar directions weigh more.

`o_i = phi(q_i) S / (phi(q_i) . z + eps)` with means `S = sum_j phi(k_j)^T v_j / M`, `z = sum_j phi(k_j) / M`, and for the C = H D channels
of a token `y = (relu(x) + 1e-6) / softplus(scale)`, `phi(x) = |y| y^p / |y^p|`; eps = 1e-6, p = 3, `scale [H, D]` learned and 0 at first.
Han et al. 2023, "FLatten Transformer: Vision Transformer using Focused Linear Attention", equations 6 and 7,
https://arxiv.org/abs/2308.00442. Lengths are over all heads, as in the authors' code: heads are coupled, and each needs a key head.

The authors' layers also add learned vectors to keys (`position`) and a depthwise convolution of v to the output (`conv`, 5 x 5, the
same for all heads); both are off by default, since they stand beside the attention. Departures: powers are taken of `y / |y|`, which
changes nothing but the range of numbers; every token is on the grid, where the authors' is a window or an image without class token;
causal, means are over the keys read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from attnbench.eager import positions, take, wide
from attnbench.fastweights import FastWeights
from attnbench.method import Citation, Cost, Limits, Method, Params, Shape, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _kernelised, _local
from ._kernelised import Normaliser, causal_cross, implementations
from ._local import LocalParams, convolved, placed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Weights

NORM = Normaliser(add=1e-6, mean=True)
LEAST = 1e-6
"""added to each channel, so that none is 0"""


@dataclass(frozen=True, kw_only=True)
class FocusedLinearParams(LocalParams):
    """How sharp features are, and what stands beside the attention."""

    power: float = param(3.0, "focusing factor p; 1 leaves features as they are", low=1.0)


def draw(shape: Shape, params: FocusedLinearParams, generator: torch.Generator) -> Weights:
    """`scale [H, D]`, zeros, and what `position` and `conv` ask for."""
    return {"scale": torch.zeros(shape.heads, shape.dim, dtype=torch.float64), **_local.draw(shape, params, generator)}


def feature(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """`phi(x)`, `[B, H, N, D]` in at least float32."""
    y = (wide(x).relu() + LEAST) / softplus(wide(scale)).unsqueeze(1)
    length = _length(y)
    sharp = (y / length) ** power
    return sharp * (length / _length(sharp))


def _length(x: Tensor) -> Tensor:
    """Of each token's channels in all heads, `[B, 1, N, 1]`."""
    return x.square().sum((1, 3), keepdim=True).sqrt()


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: FocusedLinearParams,
    rows: Tensor | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The definition."""
    w = given(weights, draw, (q, k, v), params)
    phi, at = partial(feature, scale=w["scale"], power=params.power), positions(q, rows) if params.causal else None
    out = _kernelised.attend(phi(take(q, rows)), phi(placed(wide(k), w)), wide(v), NORM, at).to(v.dtype)
    return out + take(convolved(v, params, w), rows) if params.conv else out


def experts(q: Tensor, k: Tensor, v: Tensor, params: FocusedLinearParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """One shared expert with linear hidden units, D of them, or causal one a token; the convolution beside it."""
    w = given(weights, draw, (q, k, v), params)
    phi = partial(feature, scale=w["scale"], power=params.power)
    query_map = _kernelised.mean_map(lambda q, _rows: phi(q), causal=params.causal)
    bank = _kernelised.bank(query_map, phi(placed(wide(k), w)), wide(v), causal=params.causal)
    beside = partial(take, convolved(v, params, w)) if params.conv else None
    return FastWeights((bank,), combine="linear", eps=NORM.add * (1 if params.causal else k.shape[2]), beside=beside)


def cost(shape: Shape, params: FocusedLinearParams) -> Cost:
    """As linear attention, and 2 S^2 N Dv FLOP a head to convolve. Causal the same."""
    project = {"project": _local.flops(shape, params)} if params.conv else {}
    return _kernelised.cost(shape, shape.dim, project=project, learned=shape.heads * shape.dim + _local.owned(shape, params))


def _chunked_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    small = dtype == torch.float16 and not params.causal
    return causal_cross(shape, params, dtype, device) + (["powers leave the range of float16: use bfloat16"] if small else [])


def _fused_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    channels = shape.heads * shape.dim
    found = [f"takes up to 8192 channels of all heads, not {channels}"] if channels > 8192 else []
    return found + _chunked_reasons(shape, params, dtype, device)


METHOD = Method(
    name="focused_linear",
    title="Focused linear",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation(
        "Han et al.",
        2023,
        "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        "https://arxiv.org/abs/2308.00442",
        "ICCV",
    ),
    params=FocusedLinearParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(gqa=False, cross=True),
    implementations=implementations(
        "focused_linear", Limits(gqa=False, cross=True, extra=_chunked_reasons), Limits(gqa=False, cross=True, extra=_fused_reasons)
    ),
    weights=draw,
    couples_heads=True,
)
