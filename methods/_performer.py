"""The practical implementation of Performer: scores of random directions by one product, exponentials rounded once.

Features of half-precision inputs are wanted exact to their rounding, and `exp` turns an error of its argument into a relative one: the
directions are cut into two half-precision parts, a high and a low one, that two copies of the inputs multiply in one product; into three
for `relu`, whose slope jumps where an argument changes its sign. eps stands beside the features in features of its own, so that small ones
are not rounded away: with `E = exp(..)` or `relu(..)` and b for what a query's lack,
`sum_r (E_q + b)(E_k + eps) = E_q . E_k + (eps sum_r E_q + R b eps) 1 + b sum_r E_k`.
"""

from __future__ import annotations

from functools import lru_cache
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._kernel import Kernel, Part
from ._kernelised_causal import Features, causal
from ._kernelised_chunked import bidirectional
from ._products import wide_bmm
from .performer import NORM, PerformerParams, causal_features, directions, key_features, query_features

if TYPE_CHECKING:
    from collections.abc import Sequence


def chunked(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and output: features of some heads, R elements a token."""
    if not params.causal:
        return bidirectional(q, k, v, (Relu if params.kernel == "relu" else Favor)(q, params))
    count = params.count(q.shape[3])
    if params.kernel == "relu":
        plain = Features.plain(count, lambda x, _at: query_features(x, params), lambda x, _at: key_features(x, params))
        return causal(q, k, v, plain, NORM)
    stabilised = Features(count + 1, lambda q, k, at, memory: causal_features(q, k, at - at[0], memory, params), projects=True)
    return causal(q, k, v, stabilised, NORM)


@lru_cache(maxsize=16)
def _prepared(params: PerformerParams, dim: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Directions over D^1/4 in the inputs' dtype: their parts `[P, W, D]`, the largest first; the same as `[P D, W]`, which copies of
    inputs multiply; the first part `[W, D]`, which gradients multiply.

    Beyond R the former repeat the first direction, so that a maximum is the same over all W; the latter are zero there.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        count = params.count(dim)
        scaled = dim**-0.25 * directions(params, dim, torch.float64, torch.device("cpu"))
        rest, parts = torch.cat([scaled, scaled[:1].expand(width - count, -1)]), []
        for _ in range((3 if params.kernel == "relu" else 2) if dtype.itemsize == 2 else 1):
            parts.append(rest.to(dtype))
            rest = rest - parts[-1].double()
        forwards, backwards = torch.cat(parts, 1).T.contiguous(), pad(parts[0][:count], (0, 0, 0, width - count))
        return torch.stack(parts).to(device), forwards.to(device), backwards.to(device)


class _Random(Kernel):
    """What both kernels share: R features, two beside them that hold eps, and zeros."""

    norm, projects, dominated = NORM, True, True

    def __init__(self, q: Tensor, params: PerformerParams) -> None:
        self.eps, self.count = params.relu_eps if params.kernel == "relu" else params.eps, params.count(q.shape[3])
        self.width = -(-(self.count + 2) // 8) * 8
        self.rows, self.forwards, self.backwards = _prepared(params, q.shape[3], self.width, q.dtype, q.device)

    def scores(self, x: Tensor) -> Tensor:
        """`w_r.x'` `[b, h, g, n, W]` in at least float32, beyond R the first again."""
        copies = self.forwards.shape[0] // x.shape[-1]
        left = torch.cat([x] * copies, -1) if copies > 1 else x
        return wide_bmm(left.reshape(1, -1, left.shape[-1]), self.forwards.unsqueeze(0)).view(*x.shape[:-1], -1)

    def completed(self, phi: Tensor, part: Part, rest: Tensor | float) -> Tensor:
        """`phi` with the features after the R first; `rest` is what each of a query's lacks: b above."""
        total = _sum(phi[..., : self.count])
        key = part.side == "key"
        phi[..., self.count] = 1 if key else self.eps * (total + self.count * rest)
        phi[..., self.count + 1] = total if key else rest
        phi[..., self.count + 2 :] = 0
        return phi

    def unscored(self, grad: Tensor, slope: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """The gradient of `x` in at least float32, over `part.share`, and that of scores, where their features rise by `slope`.

        Beside its own, a feature has the gradient of the one that holds the sum of all.
        """
        column, factor = (self.count + 1, 1.0) if part.side == "key" else (self.count, self.eps)
        du = grad.add_(factor * grad[..., column : column + 1]).mul_(slope)
        du[..., self.count :] = 0
        flat = du.to(self.backwards.dtype).view(1, -1, self.width)
        return wide_bmm(flat, self.backwards.unsqueeze(0)).view(*grad.shape[:-1], -1), du


class Relu(_Random):
    """`phi(x) = relu(w_r.x') + eps`."""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """Scores above 0."""
        return self.completed(x.new_empty(*x.shape[:-1], self.width).copy_(self.scores(x).clamp_(min=0)), part, self.eps)

    def backward(self, grad: Tensor, features: Tensor, _x: Tensor, part: Part, out: Tensor) -> Sequence[Tensor]:
        """The slope is 1 above 0."""
        torch.mul(self.unscored(grad, features > 0, part)[0], part.share, out=out)
        return ()


class Favor(_Random):
    """`phi(x) = exp(w_r.x' - |x'|^2 / 2 - max) + eps`; a query's features are divided by the largest value they can have, which cancels."""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """Exponentials, rounded once."""
        scores, half, phi = self.scores(x), _half(x), x.new_empty(*x.shape[:-1], self.width)
        if part.side == "key":
            offset = half.add_(scores.amax((2, 3, 4), keepdim=True))
            return self.completed(torch.exp(scores.sub_(offset), out=phi), part, 0.0)
        bound = torch.logaddexp(-half, half.new_full((), log(self.eps)))
        offset = half.add_(scores.amax(-1, keepdim=True)).add_(bound)
        return self.completed(torch.exp(scores.sub_(offset), out=phi), part, self.eps * (-bound).exp_().squeeze(-1))

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> Sequence[Tensor]:
        """The slope of an exponential is itself; all fall with `|x'|^2 / 2`."""
        dx, du = self.unscored(grad, features, part)
        torch.mul(dx.addcmul_(_sum(du).unsqueeze(-1), x, value=-(x.shape[-1] ** -0.5)), part.share, out=out)
        return ()


def _half(x: Tensor) -> Tensor:
    """`|x'|^2 / 2`, `[.., 1]`, in at least float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().mul_(x.shape[-1] ** -0.5 / 2)


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
