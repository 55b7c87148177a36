"""Nystromformer's iterative inverse in few launches: each step is four products whose sums `b I - X` are folded into them.

`X = A Z`, `T = 7 X - X X`, `U = 15 X - X T`, `Z <- (13 Z - Z U) / 4`. For tiny matrices time is launches, not arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor


def newton_schulz(a: Tensor, z: Tensor, steps: int) -> Tensor:
    """`Z [..., M, M]` after `steps` steps from `z` towards the pseudo-inverse of `a: [..., M, M]`."""
    out: Tensor = _NewtonSchulz.apply(a.flatten(0, -3), z.flatten(0, -3), steps)  # type: ignore[no-untyped-call]
    return out.view_as(a)


class _NewtonSchulz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor, steps: int) -> Tensor:
        saved = []
        for _ in range(steps):
            x = torch.bmm(a, z)
            t = torch.baddbmm(x, x, x, beta=7, alpha=-1)
            u = torch.baddbmm(x, x, t, beta=15, alpha=-1)
            saved += [z, x, t, u]
            z = torch.baddbmm(z, z, u, beta=13 / 4, alpha=-1 / 4)
        ctx.save_for_backward(a, *saved)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None]:
        """Each line undoes a product: with `G` the gradient of the next Z, `dU = -Z^T G / 4`, `dT = -X^T dU`."""
        a, *saved = ctx.saved_tensors
        da, left = torch.zeros_like(a), a.transpose(1, 2)
        for i in reversed(range(0, len(saved), 4)):
            z, x, t, u = (m.transpose(1, 2) for m in saved[i : i + 4])
            du = torch.baddbmm(dz, z, dz, beta=0, alpha=-1 / 4)
            dt = torch.baddbmm(dz, x, du, beta=0, alpha=-1)
            dx = torch.baddbmm(du, du, t, beta=15, alpha=-1).baddbmm_(dt, x, alpha=-1).baddbmm_(x, dt, alpha=-1).add_(dt, alpha=7)
            dz = torch.baddbmm(dz, dz, u, beta=13 / 4, alpha=-1 / 4).baddbmm_(left, dx)
            da.baddbmm_(dx, z)
        return da, dz, None
