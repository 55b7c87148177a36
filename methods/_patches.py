"""Convolutions whose stride is their kernel, over a grid of tokens: products of patches, which are copied anew in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

Sides = tuple[int, int]


def patches(x: Tensor, sides: Sides, kernel: Sides, groups: int) -> Tensor:
    """Patches `[G, B P, R R' C/G]` of tokens `x: [B, H, N, D]` on a grid, C = H D channels in G groups of heads.

    The last rows and columns of tokens that fill no patch are left out. Inside a patch come row, column, head and channel.
    """
    return _tiled(x, sides, kernel, groups).reshape(groups, -1, kernel[0] * kernel[1] * x.shape[1] * x.shape[3] // groups)


def _tiled(x: Tensor, sides: Sides, kernel: Sides, groups: int) -> Tensor:
    """A view `[G, B, rows, columns, R, R', H/G, D]` of `x: [B, H, N, D]`."""
    (height, width), (r, s) = sides, kernel
    image = x.view(x.shape[0], groups, x.shape[1] // groups, height, width, x.shape[3])
    whole: Tensor = image[:, :, :, : height // r * r, : width // s * s].unflatten(4, (-1, s)).unflatten(3, (-1, r))
    return whole.permute(1, 0, 3, 5, 4, 6, 2, 7)


def convolve(x: Tensor, weight: Tensor, sides: Sides) -> Tensor:
    """The convolution `[G, B P, C'/G]` of tokens `x: [B, H, N, D]` with `weight: [C', R, R', C/G]`, its stride being its kernel."""
    out: Tensor = _Convolve.apply(x.contiguous(), weight, sides)  # type: ignore[no-untyped-call]
    return out


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sides: Sides) -> Tensor:
        groups = x.shape[1] * x.shape[3] // weight.shape[3]
        ctx.save_for_backward(x, weight)
        ctx.layout = (sides, (weight.shape[1], weight.shape[2]), groups)
        return torch.bmm(patches(x, *ctx.layout), _matrix(weight, groups).transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        dx = dweight = None
        if wants_weight:
            dweight = torch.bmm(grad.transpose(1, 2), patches(x, *ctx.layout)).view_as(weight)
        if wants_x:
            (height, width), (r, s), groups = ctx.layout
            dx = torch.zeros_like(x) if height % r or width % s else torch.empty_like(x)
            target = _tiled(dx, *ctx.layout)
            target.copy_(torch.bmm(grad, _matrix(weight, groups)).view(target.shape))
        return dx, dweight, None


def _matrix(weight: Tensor, groups: int) -> Tensor:
    """`[G, C'/G, R R' C/G]` of `weight: [C', R, R', C/G]`."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)
