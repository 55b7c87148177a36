"""Kernels whose feature maps run in Triton, in one pass over their inputs; all else is as in the classes they extend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import _focused_linear, _polaformer
from ._cosformer import Cosine
from ._focused_linear import Focused
from ._kernelised_chunked import bidirectional
from ._linear import Elu
from ._performer import Favor, Relu
from ._polaformer import Polarised
from .focused_linear import LEAST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ._kernel import Part
    from .cosformer import CosformerParams
    from .focused_linear import FocusedLinearParams
    from .linear import LinearParams
    from .performer import PerformerParams
    from .polaformer import PolaformerParams


class FusedElu(Elu):
    """`elu(x) + 1`."""

    def features(self, x: Tensor, _part: Part) -> Tensor:
        """One pass."""
        from attnbench.kernels import features

        return features.elu(_flat(x)).view(x.shape)

    def backward(self, grad: Tensor, _features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """One pass."""
        from attnbench.kernels import features

        features.elu_backward(grad, _flat(x), _view(out), part.share)
        return ()


class FusedCosine(Cosine):
    """`[relu(x) sin, relu(x) cos]`; angles are made where they are used."""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """One pass."""
        from attnbench.kernels import features

        return features.cosine(_flat(x), part.tokens.start, self.step).view(*x.shape[:-1], self.width)

    def backward(self, grad: Tensor, _features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """One pass."""
        from attnbench.kernels import features

        features.cosine_backward(grad, _flat(x), _view(out), part.share, part.tokens.start, self.step)
        return ()


class FusedFocused(Focused):
    """Tokens with the channels of all heads at once."""

    def features(self, x: Tensor, _part: Part) -> Tensor:
        """One pass."""
        from attnbench.kernels import features

        return features.focus(_inner(x.squeeze(2)), self.inverse.view(self.weights[0].shape), LEAST, self.power).view(x.shape)

    def backward(self, grad: Tensor, _features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[Tensor]:
        """One pass, and a sum over programs."""
        from attnbench.kernels import features

        inverse, slope = (y.view(self.weights[0].shape) for y in (self.inverse, self.slope))
        x, out = _inner(x.squeeze(2)), out.squeeze(2)
        return (-features.focus_backward(grad, x, inverse, out, part.share, least=LEAST, power=self.power) * inverse * slope,)


class FusedPolarised(Polarised):
    """Powers of both signs at once."""

    rows: tuple[tuple[int, int, int], Tensor, Tensor] | None = None
    """heads that were asked for last, and their rows"""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """One pass."""
        from attnbench.kernels import features

        return features.powers(_flat(x), *self._rows(x, part)).view(*x.shape[:-1], self.width)

    def backward(self, grad: Tensor, _features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[Tensor, Tensor]:
        """One pass, and sums over programs."""
        from attnbench.kernels import features

        sums = features.powers_backward(grad, _flat(x), *self._rows(x, part), _view(out), part.share)
        grads = [torch.zeros_like(slope[:, 0, 0]) for slope in self.slopes]
        for own, total, slope in zip(grads, sums, self.slopes, strict=True):
            own[part.heads] = total.view(*x.shape[:2], -1).sum(0) * slope[part.heads, 0, 0]
        return grads[0], grads[1]

    def _rows(self, x: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Inverse scales and powers `[b h, D]`, the same for queries and keys of the same heads."""
        which = (x.shape[0], part.heads.start, part.heads.stop)
        if self.rows is None or self.rows[0] != which:
            inverse, power = (y[part.heads, 0, 0].repeat(x.shape[0], 1) for y in (self.inverse, self.power))
            self.rows = which, inverse, power
        return self.rows[1:]


class FusedFavor(Favor):
    """Exponentials of products, without the products being written."""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """One pass, and for keys one before it that looks for the largest score."""
        from attnbench.kernels import favor

        flat, key = _flat(x), part.side == "key"
        top = favor.largest(flat, self.rows, self.count) if key else None
        made = favor.features(flat, self.rows, self.count, scale=x.shape[-1] ** -0.5, eps=self.eps, top=top, relu=False, key=key)
        return made.view(*x.shape[:-1], -1)

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """One pass."""
        _favor_backward(self, grad, features, (x, out), part)
        return ()


class FusedRelu(Relu):
    """Positive parts of products, without the products being written."""

    def features(self, x: Tensor, part: Part) -> Tensor:
        """One pass."""
        from attnbench.kernels import favor

        key = part.side == "key"
        made = favor.features(_flat(x), self.rows, self.count, scale=0.0, eps=self.eps, top=None, relu=True, key=key)
        return made.view(*x.shape[:-1], -1)

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """One pass."""
        _favor_backward(self, grad, features, (x, out), part)
        return ()


def _favor_backward(kernel: Favor | Relu, grad: Tensor, phi: Tensor, tokens: tuple[Tensor, Tensor], part: Part) -> None:
    from attnbench.kernels import favor

    x, out = tokens
    key, relu = part.side == "key", isinstance(kernel, Relu)
    favor.features_backward(
        grad, phi, _flat(x), kernel.rows, kernel.count, _view(out),
        scale=x.shape[-1] ** -0.5, factor=1.0 if key else kernel.eps, share=part.share, relu=relu, key=key,
    )  # fmt: skip


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(x: Tensor) -> Tensor:
    """`[b, h, g, n, D]` -> `[b h g, n, D]` with unit inner stride, a copy only where strides do not allow a view."""
    return _inner(x.flatten(0, 2))


def _view(x: Tensor) -> Tensor:
    """The same of what is written to."""
    return x.view(-1, *x.shape[3:])


def linear(q: Tensor, k: Tensor, v: Tensor, _params: LinearParams) -> Tensor:
    """`[B, H, N, Dv]`."""
    return bidirectional(q, k, v, FusedElu(q.shape[3]))


def cosformer(q: Tensor, k: Tensor, v: Tensor, _params: CosformerParams) -> Tensor:
    """`[B, H, N, Dv]`."""
    return bidirectional(q, k, v, FusedCosine(q, k))


def performer(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams) -> Tensor:
    """`[B, H, N, Dv]`."""
    return bidirectional(q, k, v, (FusedRelu if params.kernel == "relu" else FusedFavor)(q, params))


def focused_linear(q: Tensor, k: Tensor, v: Tensor, params: FocusedLinearParams, *, weights: Mapping[str, Tensor]) -> Tensor:
    """`[B, H, N, Dv]`."""
    return _focused_linear.chunked(q, k, v, params, weights=weights, kernel=FusedFocused)


def polaformer(q: Tensor, k: Tensor, v: Tensor, params: PolaformerParams, *, weights: Mapping[str, Tensor]) -> Tensor:
    """`[B, H, N, Dv]`."""
    return _polaformer.chunked(q, k, v, params, weights=weights, kernel=FusedPolarised)
