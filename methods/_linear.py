"""The practical implementation of linear attention: `elu(x) + 1` in half precision, and its derivative, in few passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._kernel import Kernel, Part
from ._kernelised_causal import Features, causal
from ._kernelised_chunked import bidirectional
from .linear import NORM, feature

if TYPE_CHECKING:
    from .linear import LinearParams


def chunked(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`.

    Passes over a tensor of N x D elements, forward: 7 to make each of phi(k) and phi(q), 1 for z, 2 for S, about 4 to read the state
    and to divide, so 21 where q, k, v and the output alone are 4; backward about 38.
    """
    if params.causal:
        features = Features.plain(q.shape[3], lambda x, _at: feature(x), lambda x, _at: feature(x))
        return causal(q, k, v, features, NORM)
    return bidirectional(q, k, v, Elu(q.shape[3]))


class Elu(Kernel):
    """`phi(x) = elu(x) + 1`, rounded once."""

    norm = NORM

    def __init__(self, dim: int) -> None:
        self.width = dim

    def features(self, x: Tensor, _part: Part) -> Tensor:
        """`1 + x` above 0 and `exp(x)` below, which the derivative of elu multiplies by what it is given."""
        phi = (x + 1).clamp_(min=1)
        return _multiply(phi, x, phi, 1.0)

    def backward(self, grad: Tensor, _features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """The derivative of phi is 1 above 0 and `exp(x)` below."""
        _multiply(grad, x, out, part.share)
        return ()


def _multiply(grad: Tensor, x: Tensor, out: Tensor, factor: float) -> Tensor:
    """`factor grad phi'(x)`, written to `out`."""
    product: Tensor = torch.ops.aten.elu_backward.grad_input(grad, 1.0, factor, 1.0, False, x, grad_input=out)
    return product
