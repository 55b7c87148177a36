"""PolaFormer: linear attention that keeps the signs of queries and keys, as products of equal and of opposite signs.

With `y = x / softplus(scale)`, `p = 1 + alpha sigmoid(power)`, `x+ = relu(y)^p` and `x- = relu(-y)^p`, the keys' features are
`[k+, k-]`; the first half of the value channels is read with `[q+, q-]`, which weighs equal signs, the second with `[q-, q+]`, which
weighs opposite ones: `o_i = phi(q_i) S / (phi(q_i) . z + eps)` for each half, with means `S = sum_j phi(k_j)^T v_j / M`,
`z = sum_j phi(k_j) / M`, eps = 1e-6. `scale` and `power` `[H, D]` are learned and 0 at first; alpha = 4, so that p = 3 at first.
Meng et al. 2025, "PolaFormer: Polarity-aware Linear Attention for Vision Transformers", equations 5 to 8,
https://arxiv.org/abs/2501.15061. Scales and powers belong to heads, so that each needs a key head.

The authors' layers also add learned vectors to keys (`position`) and a depthwise convolution of v to the output (`conv`, 5 x 5, the
same for all heads), and multiply the sum by a linear function of the token, without an activation (`gate`); all are off by default, since
they stand beside the attention. Departures: the gate reads the token's queries of all heads, since a function of q, k and v has no tokens
x; every token is on the grid, where the authors' is a window or an image without class token; causal, means are over the keys read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, pad, softplus

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


@dataclass(frozen=True, kw_only=True)
class PolaformerParams(LocalParams):
    """The range of powers, and what stands beside the attention."""

    alpha: float = param(4.0, "powers are learned between 1 and 1 + alpha", low=0.0)
    gate: bool = param(False, "multiply the output by a learned linear function of the token's queries")


def draw(shape: Shape, params: PolaformerParams, generator: torch.Generator) -> Weights:
    """`scale [H, D]` and `power [H, D]`, zeros; `gate [H Dv, H D]` normal of deviation 0.02, `gate_bias`, zeros; `position`, `conv`."""
    found = {name: torch.zeros(shape.heads, shape.dim, dtype=torch.float64) for name in ("scale", "power")}
    if params.gate:
        gate = torch.empty(shape.heads * shape.dim_v, shape.heads * shape.dim, dtype=torch.float64)
        found["gate"] = torch.nn.init.trunc_normal_(gate, std=0.02, generator=generator)
        found["gate_bias"] = torch.zeros(len(gate), dtype=torch.float64)
    return {**found, **_local.draw(shape, params, generator)}


def exponent(power: Tensor, alpha: float) -> Tensor:
    """p, in at least float32."""
    return 1 + alpha * wide(power).sigmoid()


def feature(x: Tensor, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
    """`[x+, x-]`, `[B, H, N, 2 D]` in at least float32."""
    y, p = wide(x) / softplus(wide(weights["scale"])).unsqueeze(1), exponent(weights["power"], alpha).unsqueeze(1)
    return torch.cat([y.relu() ** p, (-y).relu() ** p], -1)


def opposite(features: Tensor) -> Tensor:
    """`[x-, x+]` of `[x+, x-]`."""
    return features.roll(features.shape[-1] // 2, -1)


def halves(v: Tensor) -> tuple[Tensor, Tensor]:
    """Value channels read with equal and with opposite signs."""
    half = -(-v.shape[-1] // 2)
    return v[..., :half], v[..., half:]


def finished(
    out: Tensor, q: Tensor, v: Tensor, params: PolaformerParams, weights: Mapping[str, Tensor], *, rows: Tensor | None = None
) -> Tensor:
    """The attention `out: [B, H, N, Dv]`, or of the queries at `rows`, with its convolution and gate, where they are on."""
    out = out + take(convolved(v, params, weights), rows) if params.conv else out
    if not params.gate:
        return out
    gate = linear(take(q, rows).transpose(1, 2).flatten(2), weights["gate"], weights["gate_bias"])
    gated: Tensor = out * gate.unflatten(2, (out.shape[1], -1)).transpose(1, 2)
    return gated


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: PolaformerParams,
    rows: Tensor | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The definition."""
    w = given(weights, draw, (q, k, v), params)
    at = positions(q, rows) if params.causal else None
    query, key = feature(take(q, rows), w, params.alpha), feature(placed(wide(k), w), w, params.alpha)
    same, other = halves(wide(v))
    read = (_kernelised.attend(query, key, same, NORM, at), _kernelised.attend(opposite(query), key, other, NORM, at))
    return finished(torch.cat(read, -1).to(v.dtype), q, v, params, w, rows=rows)


def experts(q: Tensor, k: Tensor, v: Tensor, params: PolaformerParams, *, weights: Mapping[str, Tensor] | None = None) -> FastWeights:
    """Two shared experts with linear hidden units, 2 D each, or causal one a token, that write a half of the channels each.

    The convolution stands beside them; the gate, which multiplies what all of this makes, is left out.
    """
    w = given(weights, draw, (q, k, v), params)
    key = feature(placed(wide(k), w), w, params.alpha)
    same, other = halves(wide(v))
    values = (pad(same, (0, other.shape[-1])), pad(other, (same.shape[-1], 0)))
    maps = (lambda q, _rows: feature(q, w, params.alpha), lambda q, _rows: opposite(feature(q, w, params.alpha)))
    banks = (
        _kernelised.bank(_kernelised.mean_map(query_map, causal=params.causal), key, value, causal=params.causal)
        for query_map, value in zip(maps, values, strict=True)
    )
    beside = partial(take, convolved(v, params, w)) if params.conv else None
    return FastWeights(tuple(banks), combine="gated", eps=NORM.add * (1 if params.causal else k.shape[2]), beside=beside)


def cost(shape: Shape, params: PolaformerParams) -> Cost:
    """As linear attention with 2 D features for D and two denominators; 2 S^2 N Dv FLOP a head to convolve, 2 N (H D)(H Dv) to gate."""
    s, wide_q, wide_v = shape, shape.heads * shape.dim, shape.heads * shape.dim_v
    beside = _local.flops(s, params) + params.gate * 2 * s.batch * s.n * wide_q * wide_v
    learned = 2 * wide_q + _local.owned(s, params) + params.gate * wide_v * (wide_q + 1)
    return _kernelised.cost(s, 2 * s.dim, reads=2, project={"project": beside} if beside else {}, learned=learned)


def _chunked_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    small = dtype == torch.float16 and not params.causal
    return causal_cross(shape, params, dtype, device) + (["powers leave the range of float16: use bfloat16"] if small else [])


METHOD = Method(
    name="polaformer",
    title="PolaFormer",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation(
        "Meng et al.",
        2025,
        "PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
        "https://arxiv.org/abs/2501.15061",
        "ICLR",
    ),
    params=PolaformerParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(gqa=False, cross=True),
    implementations=implementations(
        "polaformer",
        Limits(gqa=False, cross=True, extra=_chunked_reasons),
        Limits(gqa=False, cross=True, max_dim=256, extra=_chunked_reasons),
    ),
    weights=draw,
)
