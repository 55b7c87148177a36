"""Performer (FAVOR+): random positive features whose products estimate the softmax kernel, so that keys and values fold into one matrix.

With `x' = D^-1/4 x` and R random directions `w_r`, orthogonal in blocks of D with the lengths of Gaussian vectors,
`phi(q)_r = exp(w_r.q' - |q'|^2 / 2 - max_r w_r.q') + eps` and `phi(k)_r` likewise, its maximum over tokens too;
`o_i = phi(q_i) S / (phi(q_i) . z)` with `S = sum_j phi(k_j)^T v_j`, `z = sum_j phi(k_j)`, eps = 1e-4. `kernel = relu` is the paper's
generalised attention, `phi(x) = relu(w_r.x') + 1e-3`. Choromanski et al. 2021, "Rethinking Attention with Performers", lemma 1, equation 5
and section 3, https://arxiv.org/abs/2009.14794, with maxima and eps as in the authors' code.

The directions are no learned parameters but drawn from `seed`, the same for all heads. As in the authors' code, maxima are taken for
constants where gradients are wanted. Departures: directions are uniformly distributed, without which the estimate has a bias (`uniform`);
causal, the maximum of the keys is taken over tokens j <= i, where the authors' code lets it see the future, which eps makes visible; the
factor R^-1/2 of features, which cancels, is left out; directions are not redrawn as training goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import pad

from attnbench.eager import expand_heads, positions, take, wide
from attnbench.fastweights import FastWeights
from attnbench.method import Citation, Cost, Limits, Method, Params, Shape, param
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

from . import _kernelised
from ._kernelised import Normaliser, causal_cross, implementations

if TYPE_CHECKING:
    from torch import Tensor

NORM = Normaliser()


@dataclass(frozen=True, kw_only=True)
class PerformerParams(Params):
    """The random features."""

    features: int = param(0, "random features, R; 0 means D ln D, rounded down", low=0)
    kernel: Literal["softmax", "relu"] = param("softmax", "what the features are of: `relu` is the generalised attention")
    lengths: Literal["gaussian", "fixed"] = param("gaussian", "lengths of the random directions: drawn, or all D^1/2")
    uniform: bool = param(
        True, "directions point anywhere alike; false leaves out signs of the QR decomposition, as the authors' code does"
    )
    seed: int = param(0, "seed of the random directions", low=0)
    eps: float = param(1e-4, "added to each feature of the softmax kernel", low=1e-9)
    relu_eps: float = param(1e-3, "added to each feature of the ReLU kernel", low=1e-9)

    def count(self, dim: int) -> int:
        """R."""
        return self.features or max(1, int(dim * math.log(dim)))


def _orthogonal(gaussian: Tensor, params: PerformerParams) -> Tensor:
    """Orthogonal rows, uniformly distributed where R has a positive diagonal, which numerical libraries do not see to."""
    q, r = torch.linalg.qr(gaussian)
    rows: Tensor = (q * r.diagonal().sign() if params.uniform else q).T
    return rows


@lru_cache(maxsize=64)
def directions(params: PerformerParams, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random directions `[R, D]`, drawn in float64 on the CPU: rows of orthogonal matrices, one for D features each, times lengths."""
    count, g = params.count(dim), torch.Generator().manual_seed(params.seed)
    with torch.inference_mode(mode=False), torch.no_grad():
        blocks = [_orthogonal(torch.randn(dim, dim, generator=g, dtype=torch.float64), params) for _ in range(-(-count // dim))]
        drawn = torch.randn(count, dim, generator=g, dtype=torch.float64).norm(dim=1)
        lengths = drawn if params.lengths == "gaussian" else torch.full_like(drawn, dim**0.5)
        return (torch.cat(blocks)[:count] * lengths.unsqueeze(1)).to(device, dtype)


def projected(x: Tensor, params: PerformerParams) -> Tensor:
    """`w_r.x'`, `[B, H, N, R]` in at least float32."""
    x = wide(x) * x.shape[-1] ** -0.25
    dots: Tensor = x @ directions(params, x.shape[-1], x.dtype, x.device).T
    return dots


def half_square(x: Tensor) -> Tensor:
    """`|x'|^2 / 2`, `[B, H, N, 1]`."""
    half: Tensor = wide(x).square().sum(-1, keepdim=True) / (2 * x.shape[-1] ** 0.5)
    return half


def query_features(q: Tensor, params: PerformerParams) -> Tensor:
    """`phi(q)`, `[B, H, N, R]`."""
    dots = projected(q, params)
    if params.kernel == "relu":
        return dots.relu() + params.relu_eps
    return (dots - half_square(q) - dots.amax(-1, keepdim=True).detach()).exp() + params.eps


def key_features(k: Tensor, params: PerformerParams) -> Tensor:
    """`phi(k)`, `[B, Hkv, M, R]`, the maximum over all tokens."""
    dots = projected(k, params)
    if params.kernel == "relu":
        return dots.relu() + params.relu_eps
    return (dots - half_square(k) - dots.amax((-1, -2), keepdim=True).detach()).exp() + params.eps


def causal_features(
    q: Tensor, k: Tensor, places: Tensor, memory: Tensor, params: PerformerParams
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Causal features of the softmax kernel, `[B, H, R', R + 1]` and `[B, Hkv, n, R + 1]`, of queries at `places` among n tokens.

    Where `m_i` is the largest `w_r.k'_j` up to token i and c the last of them, `exp(u - m_i) + eps` is, but for a factor that cancels,
    `exp(u - c) + exp(m_i - c) eps`: the keys' features are `exp(u_j - c)` and 1, which no longer depend on i, and the queries' are
    `phi(q_i)` and `exp(m_i - c) eps sum_r phi(q_i)_r`. `memory` is the m of the token before these, empty for the first. Returned are
    also the factor of a sum of earlier tokens' features, which are of an older c, and the last m.
    """
    dots = projected(k, params)
    before = memory if memory.numel() else dots.new_full((*dots.shape[:2], 1), -torch.inf)
    running = torch.cat([before, dots.detach().amax(-1)], 2).cummax(2).values[..., 1:]
    last = running[..., -1:]
    top = last.unsqueeze(3)
    key = pad((dots - half_square(k) - top).exp(), (0, 1), value=1.0)
    floor = math.log(torch.finfo(dots.dtype).tiny)  # a row that far below c has lost its keys to underflow, and reads all alike
    level = (running[..., places].unsqueeze(3) - top).clamp(min=floor).exp()
    level, older = expand_heads(q, level, (before.unsqueeze(3) - top).exp())
    query = query_features(q, params)
    query = torch.cat([query, params.eps * level * query.sum(-1, keepdim=True)], 3)
    factor = pad(older.expand(-1, -1, query.shape[3] - 1, -1), (0, 0, 0, 1), value=1.0)
    return query, key, factor, last


def _features(q: Tensor, k: Tensor, rows: Tensor, params: PerformerParams) -> tuple[Tensor, Tensor]:
    """Features of the queries at `rows`, and of the keys."""
    if params.causal and params.kernel == "softmax":
        query, key, _, _ = causal_features(q, k, rows, k.new_empty(0), params)
        return query, key
    return query_features(q, params), key_features(k, params)


def reference(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    at = positions(q, rows)
    query, key = _features(take(q, rows), k, at, params)
    return _kernelised.attend(query, key, wide(v), NORM, at if params.causal else None).to(v.dtype)


def experts(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams) -> FastWeights:
    """One shared expert with linear hidden units: R of them, or causal one a token."""
    key, value = expand_heads(q, _features(q, k, positions(q, None), params)[1], wide(v))
    bank = _kernelised.bank(lambda q, rows: _features(q, k, rows, params)[0], key, value, causal=params.causal)
    return FastWeights((bank,), combine="linear")


def cost(shape: Shape, params: PerformerParams) -> Cost:
    """2 R D FLOP for each query and key to make features; then as linear attention with R for D. Causal the same."""
    features = params.count(shape.dim)
    tokens = shape.batch * (shape.heads * shape.n + shape.kv_heads * shape.keys)
    return _kernelised.cost(shape, features, project={"project": 2 * tokens * features * shape.dim}, learned=features * shape.dim)


def budget(_shape: Shape, _params: PerformerParams, units: int) -> dict[str, object]:
    """As many random features."""
    return {"features": units}


def _chunked_reasons(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    assert isinstance(params, PerformerParams)
    small = params.kernel == "softmax" and not params.causal and dtype == torch.float16
    return causal_cross(shape, params, dtype, device) + (["exponentials leave the range of float16: use bfloat16"] if small else [])


METHOD = Method(
    name="performer",
    title="Performer",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.LINEAR, Count.SHARED, Construction.KERNELIZATION, Topology.ALL_TO_ONE),
    citation=Citation("Choromanski et al.", 2021, "Rethinking Attention with Performers", "https://arxiv.org/abs/2009.14794", "ICLR"),
    params=PerformerParams,
    reference=reference,
    experts=experts,
    cost=cost,
    budget=budget,
    limits=Limits(cross=True),
    implementations=implementations(
        "performer", Limits(cross=True, extra=_chunked_reasons), Limits(cross=True, max_dim=128, extra=_chunked_reasons)
    ),
    surrogate="the maxima that keep exponentials small are taken for constants",
)
