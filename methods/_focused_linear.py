"""The practical implementation of focused linear attention: features of some tokens of all heads, and their derivative."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import softplus

from attnbench.eager import wide
from attnbench.stages import stage

from ._kernel import Kernel, Part
from ._kernelised_causal import Features, causal
from ._kernelised_chunked import bidirectional
from ._local import convolved, placed
from .focused_linear import LEAST, NORM, FocusedLinearParams, feature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: FocusedLinearParams,
    *,
    weights: Mapping[str, Tensor],
    kernel: Callable[[Tensor, float], Kernel] | None = None,
) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and output: features of some tokens."""
    k, scale = placed(k, weights), weights["scale"]
    if params.causal:
        phi = partial(feature, scale=scale, power=params.power)
        return causal(q, k, v, Features.plain(q.shape[3], lambda x, _at: phi(x), lambda x, _at: phi(x)), NORM)
    out = bidirectional(q, k, v, (kernel or Focused)(scale, params.power))
    if not params.conv:
        return out
    with stage("project"):
        return out + convolved(v, params, weights)


class Focused(Kernel):
    """`phi(x) = |y| y^p / |y^p|` with `y = (relu(x) + 1e-6) / softplus(scale)`, lengths over all heads."""

    norm, couples_heads = NORM, True

    def __init__(self, scale: Tensor, power: float) -> None:
        self.weights, self.power, self.width = (scale,), power, scale.shape[1]
        self.scale = wide(scale.detach()).view(-1, 1, 1, scale.shape[1])
        self.inverse = 1 / softplus(self.scale)

    @cached_property
    def slope(self) -> Tensor:
        """What the gradient of the scale multiplies."""
        return self.scale.sigmoid()

    def _scaled(self, x: Tensor) -> Tensor:
        """y, in at least float32."""
        least = LEAST * self.inverse
        return torch.addcmul(least, x, self.inverse).clamp_(min=least)

    def features(self, x: Tensor, _part: Part) -> Tensor:
        """Powers of `y / |y|`, rounded once."""
        y = self._scaled(x)
        length = _length(y)
        y.div_(length).pow_(self.power)
        return torch.mul(y, length.div_(_length(y)), out=x.new_empty(x.shape))

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[Tensor]:
        """With `e = g phi` and `t = sum e`: `y dy = p (e - t phi^2 / |phi|^2) + t y^2 / |y|^2`."""
        phi, y = wide(features), self._scaled(x)
        change = grad * phi
        total, squares = _total(change), phi.mul_(phi)
        change.addcmul_(squares, total / _total(squares), value=-1).mul_(self.power)
        squares = torch.mul(y, y, out=squares)
        change.addcmul_(squares, total / _total(squares)).mul_(part.share * self.inverse)
        scale = -(change.sum((0, 2, 3)) * self.slope[:, 0, 0])
        torch.mul(change.div_(y), x > 0, out=out)
        return (scale,)


def _length(y: Tensor) -> Tensor:
    """Of each token's channels in all heads: first in each head, which lie together."""
    length: Tensor = vector_norm(vector_norm(y, dim=4, keepdim=True), dim=1, keepdim=True)
    return length


def _total(x: Tensor) -> Tensor:
    return x.sum(4, keepdim=True).sum(1, keepdim=True)
