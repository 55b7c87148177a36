"""The practical implementation of PolaFormer: features once for both halves of the values, and their derivative.

Queries with the opposite order of features read a state as queries with the equal order read its rows in the opposite order: so one
product of queries reads both halves, from a matrix in which the second half's rows are exchanged.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from attnbench.eager import wide
from attnbench.stages import stage

from ._kernel import Kernel, Part
from ._kernelised_causal import Features, causal
from ._kernelised_chunked import bidirectional
from ._local import placed
from .polaformer import NORM, PolaformerParams, exponent, feature, finished, halves, opposite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: PolaformerParams,
    *,
    weights: Mapping[str, Tensor],
    kernel: Callable[[Tensor, PolaformerParams, Mapping[str, Tensor]], Kernel] | None = None,
) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and output: features of some heads, 2 D elements a token."""
    keys = placed(k, weights)
    made = (kernel or Polarised)(v, params, weights)
    out = _causal(q, keys, v, params, weights) if params.causal else bidirectional(q, keys, v, made)
    if not (params.conv or params.gate):
        return out
    with stage("project"):
        return finished(out, q, v, params, weights)


def _causal(q: Tensor, k: Tensor, v: Tensor, params: PolaformerParams, weights: Mapping[str, Tensor]) -> Tensor:
    """Each half of the values by itself."""

    def same(x: Tensor, _at: Tensor) -> Tensor:
        return feature(x, weights, params.alpha)

    def other(x: Tensor, _at: Tensor) -> Tensor:
        return opposite(same(x, _at))

    width = 2 * q.shape[3]
    maps = (Features.plain(width, query, same) for query in (same, other))
    return torch.cat([causal(q, k, half, own, NORM) for half, own in zip(halves(v), maps, strict=True)], -1)


class Polarised(Kernel):
    """`phi(x) = [relu(y)^p, relu(-y)^p]` with `y = x / softplus(scale)`, `p = 1 + alpha sigmoid(power)`."""

    norm, vanishes, reads = NORM, True, 2

    def __init__(self, v: Tensor, params: PolaformerParams, weights: Mapping[str, Tensor]) -> None:
        self.weights = (weights["scale"], weights["power"])
        self.values, (heads, dim) = v.shape[3], self.weights[0].shape
        self.width = 2 * dim
        self.alpha, self.own = params.alpha, [x.detach().view(heads, 1, 1, dim) for x in self.weights]
        self.inverse, self.power = 1 / softplus(wide(self.own[0])), exponent(self.own[1], self.alpha)

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """What gradients of scales and powers multiply."""
        scale, share = wide(self.own[0]), wide(self.own[1]).sigmoid()
        return -self.inverse * scale.sigmoid(), self.alpha * share * (1 - share)

    def features(self, x: Tensor, part: Part) -> Tensor:
        """Powers in float32, rounded once."""
        phi, y, power = x.new_empty(*x.shape[:-1], self.width), x * self.inverse[part.heads], self.power[part.heads]
        plus, minus = phi.chunk(2, -1)
        torch.pow(y.clamp(min=0), power, out=plus)
        torch.pow(y.neg_().clamp_(min=0), power, out=minus)
        return phi

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[Tensor, Tensor]:
        """With `e = g+ x+ + g- x-`, of which one term is 0: `dx = p e / x`, `ds = -sum p e / s`, `dp = sum e log |y|`."""
        (plus, minus), (positive, negative) = grad.chunk(2, -1), features.chunk(2, -1)
        change, wide_x = (plus * positive).addcmul_(minus, negative), wide(x)
        logs = (wide_x * self.inverse[part.heads]).abs_().clamp_(min=torch.finfo(wide_x.dtype).tiny).log_()
        grads = [torch.zeros_like(slope[:, 0, 0]) for slope in self.slopes]
        grads[1][part.heads] = part.share * logs.mul_(change).sum((0, 2, 3))
        change.mul_(part.share * self.power[part.heads])
        grads[0][part.heads] = change.sum((0, 2, 3))
        torch.div(change, wide_x.masked_fill(x == 0, 1), out=out)
        return grads[0] * self.slopes[0][:, 0, 0], grads[1] * self.slopes[1][:, 0, 0]

    def spread(self, state: Tensor) -> Tensor:
        """The second half of the values, and the second denominator, with the halves of features exchanged."""
        matrix, second = state.clone(), self.columns(self.values)[1]
        matrix[..., second] = state[..., second].roll(self.width // 2, 2)
        matrix[..., self.values + 1] = state[..., self.values].roll(self.width // 2, 2)
        return matrix

    def gather(self, grad: Tensor) -> Tensor:
        """The same exchange; both denominators are of the same sum."""
        state, second = grad.clone(), self.columns(self.values)[1]
        state[..., second] = grad[..., second].roll(self.width // 2, 2)
        state[..., self.values] += grad[..., self.values + 1].roll(self.width // 2, 2)
        return state
