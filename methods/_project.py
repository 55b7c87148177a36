"""Tokens mixed by a learned matrix, `y = E x` with `E: [K, M]` shared by many heads, and its gradients in few passes over x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._products import divisor, wide_bmm

if TYPE_CHECKING:
    from torch import Tensor

_BUSY = 128
"""products of one call that keep a GPU busy"""
_RUN = 1024
"""tokens in a run, about, where heads alone are too few"""


def project(e: Tensor, x: Tensor) -> Tensor:
    """`E x` `[B, H, K, D]` of `x: [B, H, M, D]` and `e: [K, M]`, or `[H, K, M]` with a matrix for each head; sums in float32."""
    with stage("project"):
        if e.ndim == 2:
            shared: Tensor = _Project.apply(e, x.flatten(0, 1))  # type: ignore[no-untyped-call]
            return shared.view(*x.shape[:2], *shared.shape[1:])
        return torch.stack([_Project.apply(e[h], x[:, h]) for h in range(x.shape[1])], 1)  # type: ignore[no-untyped-call]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, x: Tensor) -> Tensor:
        """`e: [K, M]`, `x: [X, M, D]` -> `[X, K, D]`."""
        ctx.save_for_backward(e, x)
        return _product(e, x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`dx = E^T g` for each head; `dE = sum over heads of g x^T`, heads side by side so that one product sums them."""
        e, x = ctx.saved_tensors
        wants_e, wants_x = ctx.needs_input_grad
        dx = torch.bmm(e.t().expand(x.shape[0], -1, -1), grad) if wants_x else None
        return (_outer(grad, x) if wants_e else None), dx


def _product(e: Tensor, x: Tensor) -> Tensor:
    heads, runs = len(x), divisor(x.shape[1], x.shape[1] // _RUN)
    if 2 * heads >= _BUSY or runs == 1:
        return wide_bmm(e.expand(heads, -1, -1), x)
    together = min(heads, -(-_BUSY // runs))
    # repeated for the heads taken together, so that heads and runs are one batch; a view where that is one head
    parts = e.unflatten(1, (runs, -1)).transpose(0, 1).expand(together, -1, -1, -1).flatten(0, 1)
    products = [wide_bmm(parts[: len(some) * runs], some.reshape(-1, x.shape[1] // runs, x.shape[2])) for some in x.split(together)]
    return torch.cat([some.unflatten(0, (-1, runs)).sum(1) for some in products])


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """`sum over X of g x^T` `[K, M]` of `grad: [X, K, D]` and `x: [X, M, D]`, some tokens at a time."""
    left, out = grad.transpose(0, 1).flatten(1), x.new_empty(grad.shape[1], x.shape[1])
    for tokens, target in zip(*(y.split(rows_per_chunk(x, x[:, 0].nbytes), 1) for y in (x, out)), strict=True):
        torch.mm(left, tokens.transpose(0, 1).flatten(1).t(), out=target)
    return out
