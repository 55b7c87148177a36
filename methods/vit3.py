"""ViT^3: a gated linear unit a head, trained by one gradient step on all keys and values, and read by all queries.

`f(x) = (x W1) silu(x W2)` with loss `-(s / N) sum_j f(k_j) . v_j`, `s = 1/3`. With `e = -s v / N`, `a = k W1`, `b = k W2` and
`c = sigmoid(b)` its gradients are `G1 = k^T (e b c)` and `G2 = k^T (e a c (1 + b (1 - c)))`; each column, over the input dimension, is
divided by its norm plus 1, and `W' = W - lr G`: `o_i = (q_i W1') silu(q_i W2')`. Han et al. 2025, "ViT^3: Unlocking Test-Time Training in
Vision", https://arxiv.org/abs/2512.01643, in the closed form of the authors' code.

`conv` adds their second inner model, a depthwise convolution of the grid with D channels of its own, trained on the same loss: each
channel's kernel gradient is divided by its norm plus 1. Departures: the paper maps the layer's input to that branch's queries, keys and
values, and lets the output projection read its D channels beside the heads; here learned maps take it from q, k and v of all heads and add
it to all heads' outputs. Rotary embedding is the layer's. Everything is in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad, silu
from torch.nn.init import trunc_normal_

from attnbench.eager import expand_heads, take, wide
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape, Weights, given, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._grid import GridParams

if TYPE_CHECKING:
    from collections.abc import Mapping

SCALE = 1 / 3
"""s, the authors' (3 x 3)^-1/2 for both inner models"""


@dataclass(frozen=True, kw_only=True)
class Vit3Params(GridParams):
    """The step, and whether there is a second inner model."""

    lr: float = param(1.0, "inner learning rate", low=0)
    conv: int = param(
        0, "side of the kernel of the convolution that is trained too; the paper has 3, and 0 leaves it out", unit="tokens", low=0
    )

    def problems(self, shape: Shape) -> list[str]:
        """Adds a kernel that has no centre."""
        found = super().problems(shape)
        return [*found, f"conv = {self.conv} is even: give an odd kernel size, or 0"] if self.conv and self.conv % 2 == 0 else found


def initial_weights(shape: Shape, params: Vit3Params, generator: torch.Generator) -> Weights:
    """All N(0, 0.02), as in the authors' code."""
    s = shape
    sizes: dict[str, tuple[int, ...]] = {"w1": (s.heads, s.dim, s.dim_v), "w2": (s.heads, s.dim, s.dim_v)}
    if params.conv:
        inputs = {"q": s.heads * s.dim, "k": s.kv_heads * s.dim, "v": s.kv_heads * s.dim_v}
        sizes |= {"kernel": (s.dim, params.conv, params.conv), "conv_out": (s.dim, s.heads * s.dim_v)}
        sizes |= {f"conv_{name}": (width, s.dim) for name, width in inputs.items()}
    return {name: trunc_normal_(torch.empty(size, dtype=torch.float64), std=0.02, generator=generator) for name, size in sizes.items()}


def outer_factors(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """What `k^T` multiplies in `-N G1` and `-N G2`, `[B, H, M, Dv]` each."""
    a, b = k @ w1, k @ w2
    c = b.sigmoid()
    return SCALE * v * b * c, SCALE * v * a * c * (1 + b * (1 - c))


def step(w: Tensor, g: Tensor, lr: float) -> Tensor:
    """`w - lr g`, each column of g divided by its norm plus 1."""
    after: Tensor = w - lr * g / (g.norm(dim=-2, keepdim=True) + 1)
    return after


def read(q: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """`(q W1) silu(q W2)`."""
    gate: Tensor = silu(q @ w2)
    return (q @ w1) * gate


def conv_branch(q: Tensor, k: Tensor, v: Tensor, params: Vit3Params, own: Mapping[str, Tensor]) -> Tensor:
    """The second inner model's part of the output, `[B, H, N, Dv]`."""
    sides, size = params.sides(q.shape[2]), params.conv
    a, b, c = (
        (wide(x).transpose(1, 2).flatten(2) @ wide(own[f"conv_{name}"])).transpose(1, 2).unflatten(2, sides)
        for name, x in zip("qkv", (q, k, v), strict=True)
    )
    full, error = pad(b, [size // 2] * 4), -SCALE / q.shape[2] * c
    shifts = [(full[..., y : y + sides[0], x : x + sides[1]] * error).sum((-2, -1)) for y in range(size) for x in range(size)]
    g = torch.stack(shifts, -1).unflatten(-1, (size, size))
    kernel = wide(own["kernel"]) - params.lr * g / (g.norm(dim=(-2, -1), keepdim=True) + 1)
    mapped: Tensor = conv2d(a.flatten(0, 1).unsqueeze(0), kernel.flatten(0, 1).unsqueeze(1), padding=size // 2, groups=len(a) * a.shape[1])
    tokens: Tensor = (mapped.view(a.shape).flatten(2).transpose(1, 2) @ wide(own["conv_out"])).unflatten(2, (q.shape[1], -1))
    return tokens.transpose(1, 2)


def reference(
    q: Tensor, k: Tensor, v: Tensor, params: Vit3Params, rows: Tensor | None = None, *, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The definition."""
    own = given(weights, initial_weights, (q, k, v), params)
    key, value = expand_heads(q, wide(k), wide(v))
    w1, w2 = wide(own["w1"]), wide(own["w2"])
    g1, g2 = (-key.transpose(-1, -2) @ x / k.shape[2] for x in outer_factors(key, value, w1, w2))
    out = read(wide(take(q, rows)), step(w1, g1, params.lr), step(w2, g2, params.lr))
    return (out + take(conv_branch(q, k, v, params, own), rows) if params.conv else out).to(v.dtype)


def cost(shape: Shape, params: Vit3Params) -> Cost:
    """8 M D Dv FLOP a head to train the unit and 4 N D Dv to read it; with a kernel of C x C, 4 C^2 N D and its linear maps once."""
    s, heads, area = shape, shape.batch * shape.heads, params.conv**2
    flops = {"state": 8 * heads * s.keys * s.dim * s.dim_v, "attend": 4 * heads * s.n * s.dim * s.dim_v}
    learned, states = 2 * s.heads * s.dim * s.dim_v, 2 * heads * s.dim * s.dim_v
    if params.conv:
        maps = s.dim * (s.heads * (s.dim + s.dim_v) + s.kv_heads * (s.dim + s.dim_v))
        inner = 2 * s.batch * s.n * s.dim * area
        flops = {"project": 2 * s.batch * s.n * maps, "state": flops["state"] + inner, "attend": flops["attend"] + inner}
        learned, states = learned + maps + s.dim * area, states + s.batch * s.dim * area
    branch = s.batch * s.n * 4 * s.dim if params.conv else 0  # its queries, keys, values and outputs
    traffic = {
        "project": branch,
        "state": s.batch * s.kv_heads * s.keys * (s.dim + s.dim_v) + states + branch,
        "attend": heads * s.n * (s.dim + s.dim_v) + states + branch,
    }
    return Cost.of(s, flops, extra=learned + states, traffic=traffic)


def _cross(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    assert isinstance(params, Vit3Params)
    unequal = params.conv and shape.keys != shape.n
    return [f"a convolution of the grid needs as many keys as queries, not {shape.keys} for {shape.n}"] if unequal else []


METHOD = Method(
    name="vit3",
    title="ViT^3",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MODULE, Count.SHARED, Construction.TEST_TIME_TRAINING, Topology.ALL_TO_ONE),
    citation=Citation("Han et al.", 2025, "ViT^3: Unlocking Test-Time Training in Vision", "https://arxiv.org/abs/2512.01643"),
    params=Vit3Params,
    reference=reference,
    weights=initial_weights,
    cost=cost,
    no_experts="its expert is a gated unit moved by a gradient step, both of whose layers read the query: no rows of keys and values",
    limits=Limits(cross=True, no_causal="the one gradient step is taken on all tokens", extra=_cross),
    implementations=(
        Implementation(
            "chunked",
            "attnbench.methods._vit3:chunked",
            Limits(cross=True),
            note="chunks of tokens, computed again in the backward pass",
        ),
    ),
)
