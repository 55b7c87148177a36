"""Nystromformer: softmax attention through its Nystrom approximation on segment means.

With segment means `a = Pool(q)`, `b = Pool(k)` (M rows each) and `c = D^-1/2`: `F = softmax(c q b^T)`, `A = softmax(c a b^T)`,
`G = softmax(c a k^T)`, `o = F Z (G v)` with `Z` near the pseudo-inverse of `A`, by
`Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Z = A^T / (max column sum * max row sum of A)`.
Xiong et al. 2021, https://arxiv.org/abs/2102.03902.

Departures: the first `Z` is scaled matrix by matrix, where the authors' code takes the maximum over the whole batch and so lets
batch mates change each other's output; `Z` is computed in at least float32; bins are adaptive where M does not divide N, where the
authors' code fails; M = N follows the formulas like any other M. The authors' depthwise convolution of v along the sequence is
learned, so the built module adds it (`conv`), not the function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn.functional import conv2d

from attnbench.eager import attend, expand_heads, masked_softmax, take, wide
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import AttentionModule, Citation, Cost, Implementation, Limits, Method, Params, Shape, param
from attnbench.sdpa import attention
from attnbench.stages import stage
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from ._landmarks import bins, pool
from ._newton_schulz import newton_schulz

if TYPE_CHECKING:
    from torch import Tensor

_SVD = 21  # FLOP / M^3 of a full singular value decomposition by bidiagonalisation (Golub and Van Loan, Matrix Computations)


@dataclass(frozen=True, kw_only=True)
class NystromformerParams(Params):
    """Landmarks and how their attention matrix is inverted."""

    landmarks: int = param(64, "segment means of q and of k, M", unit="tokens", low=1, at_most="n")
    iterations: int = param(6, "steps of the iterative inverse; each is four M x M products", low=1)
    inverse: Literal["iterative", "exact"] = param("iterative", "`exact` is the pseudo-inverse by singular values")
    conv: int = param(0, "kernel size of the depthwise convolution of v that the built module adds; 0 adds none", unit="tokens", low=0)

    def problems(self, shape: Shape) -> list[str]:
        """Adds a kernel that has no centre."""
        found = super().problems(shape)
        return [*found, f"conv = {self.conv} is even: give an odd kernel size, or 0"] if self.conv and self.conv % 2 == 0 else found


def inverse(a: Tensor, params: NystromformerParams) -> Tensor:
    """The approximate or exact pseudo-inverse of `a: [..., M, M]`, in at least float32."""
    a = wide(a)
    if params.inverse == "exact":
        exact: Tensor = torch.linalg.pinv(a)
        return exact
    eye, z = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), _first(a)
    for _ in range(params.iterations):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    return z


def _first(a: Tensor) -> Tensor:
    """Where the iteration starts: the transpose, scaled so that it converges."""
    return a.transpose(-1, -2) / (a.sum(-2).amax(-1) * a.sum(-1).amax(-1))[..., None, None]


def _fused_inverse(a: Tensor, params: NystromformerParams) -> Tensor:
    """`inverse` in fewer launches."""
    a = wide(a)
    return inverse(a, params) if params.inverse == "exact" else newton_schulz(a, _first(a), params.iterations)


def _landmarks(q: Tensor, k: Tensor, params: NystromformerParams) -> tuple[Tensor, Tensor]:
    """Segment means of q, and of k with its heads repeated to those of q."""
    a, b = (pool(x, params.landmarks, 2).to(x.dtype) for x in (q, k))
    return a, expand_heads(q, b, b)[0]


def _affinity(a: Tensor, b: Tensor) -> Tensor:
    """`A [B, H, M, M]`, in at least float32."""
    return masked_softmax(a.shape[-1] ** -0.5 * (a @ b.transpose(-1, -2)))


def _compressed(q: Tensor, k: Tensor, v: Tensor, params: NystromformerParams) -> tuple[Tensor, Tensor]:
    """Landmark keys `b` and their values `Z G v`."""
    a, b = _landmarks(q, k, params)
    k, v = expand_heads(q, k, v)
    read = attend(a, k, v, q.shape[-1] ** -0.5)
    return b, (inverse(_affinity(a, b), params) @ wide(read)).to(read.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, params: NystromformerParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    keys, values = _compressed(q, k, v, params)
    return attend(take(q, rows), keys, values, q.shape[-1] ** -0.5)


def experts(q: Tensor, k: Tensor, v: Tensor, params: NystromformerParams) -> FastWeights:
    """One shared expert: landmark keys, and values of either sign."""
    keys, values = _compressed(q, k, v, params)
    return FastWeights((Bank(w1=keys.unsqueeze(2), w2=values.unsqueeze(2), scale=q.shape[-1] ** -0.5),))


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: NystromformerParams) -> Tensor:
    """F and G by scaled_dot_product_attention; only M x M matrices are written."""
    with stage("pool"):
        a, b = _landmarks(q, k, params)
    with stage("compress"):
        read = attention(a, k, v)
    with stage("invert"):
        mixed = (_fused_inverse(_affinity(a, b), params) @ wide(read)).to(read.dtype)
    with stage("attend"):
        return attention(q, b, mixed)


def cost(shape: Shape, params: NystromformerParams) -> Cost:
    """8 N M D + 4 M^2 D FLOP a head where Dv = D, and 8 M^3 a step of the inverse; the convolution of the module is left out."""
    s, m, heads, kv_heads = shape, params.landmarks, shape.batch * shape.heads, shape.batch * shape.kv_heads
    steps = 8 * params.iterations if params.inverse == "iterative" else _SVD + 2
    members = s.batch * s.dim * sum(b - a for a, b in bins(s.n, m))
    flops = {
        "pool": members * (s.heads + s.kv_heads),
        "probe": 2 * heads * m * s.keys * s.dim,
        "compress": 2 * heads * m * s.keys * s.dim_v,
        "invert": 2 * heads * m * m * (s.dim + s.dim_v) + steps * heads * m**3,
        "score": 2 * heads * s.n * m * s.dim,
        "attend": 2 * heads * s.n * m * s.dim_v,
    }
    traffic = {
        "pool": heads * (s.n + m) * s.dim + kv_heads * (s.keys + m) * s.dim,
        "probe": (heads * m + kv_heads * s.keys) * s.dim,
        "compress": (heads * m + kv_heads * s.keys) * s.dim_v,
        "invert": heads * m * (s.dim + 2 * s.dim_v) + kv_heads * m * s.dim,
        "attend": heads * s.n * (s.dim + s.dim_v) + heads * m * s.dim_v + kv_heads * m * s.dim,
    }
    return Cost.of(s, flops, extra=heads * m * (2 * s.dim + s.dim_v), traffic=traffic)


def budget(_shape: Shape, _params: NystromformerParams, units: int) -> dict[str, object]:
    """As many landmarks."""
    return {"landmarks": units}


class NystromAttention(AttentionModule):
    """Nystromformer with its depthwise convolution of v along the sequence, one kernel a head."""

    def __init__(self, shape: Shape, params: NystromformerParams) -> None:
        super().__init__(METHOD, params)
        kernel, heads = params.conv, shape.heads
        self.conv = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False) if kernel else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q, k, v: [B, H, N, D]` -> `[B, H, N, Dv]`."""
        out = super().forward(q, k, v)
        if self.conv is None:
            return out
        values = expand_heads(q, k, v)[1]
        kernel = self.conv.weight.to(v.dtype)  # no autocast is on here that would cast it
        return out + conv2d(values, kernel, padding=self.conv.padding, groups=self.conv.groups)


METHOD = Method(
    name="nystromformer",
    title="Nystromformer",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LANDMARK_PROBING, Topology.ALL_TO_ONE),
    citation=Citation(
        "Xiong et al.",
        2021,
        "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
        "https://arxiv.org/abs/2102.03902",
        "AAAI",
    ),
    params=NystromformerParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(no_causal="segment means average later tokens"),
    implementations=(Implementation("sdpa", "attnbench.methods.nystromformer:sdpa"),),
    builder=NystromAttention,
)
