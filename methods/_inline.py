"""InLine attention as products: one sum of outer products, one affine map, an analytic backward pass.

Only inputs, output and gradients are as long as the sequence; in half precision the means are taken off the D x Dv sums, not off the
tokens, so that no centred copy exists. Passes over a tensor of N x D elements in half precision: forward 2 for the means, 2 to sum outer
products, 4 to read the state, the output being filled with the mean first; backward 13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from attnbench.eager import wide
from attnbench.stages import stage

from ._products import outer_sum

if TYPE_CHECKING:
    from torch import Tensor


def affine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`mean(v) + D^-1/2 q Cov(k, v)` `[B, H, N, Dv]` of `q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `v: [B, Hkv, M, Dv]`."""
    rows = q.reshape(k.shape[0] * k.shape[1], -1, q.shape[3])
    out: Tensor = _Affine.apply(rows, k.flatten(0, 1), v.flatten(0, 1))  # type: ignore[no-untyped-call]
    return out.view(*q.shape[:3], v.shape[3])


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q: [X, N, D]`, `k: [X, M, D]`, `v: [X, M, Dv]` -> `[X, N, Dv]`."""
        with stage("state"):
            means = [x.mean(1, keepdim=True, dtype=wide(x[:0]).dtype) for x in (k, v)]
            values, mean = _centred(v, means[1])
            covariance = outer_sum(k, values) / k.shape[1] - means[0].transpose(1, 2) * mean
        ctx.save_for_backward(q, k, v, *means, covariance)
        with stage("attend"):
            return torch.baddbmm(means[1].to(q.dtype), q, covariance.to(q.dtype), alpha=q.shape[2] ** -0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`dCov = c q^T g`, `dq = c g Cov^T`, `dk = (v - mean) dCov^T / M`, `dv = (k - mean) dCov / M + sum_i g_i / M`."""
        q, k, v, key_mean, value_mean, covariance = ctx.saved_tensors
        scale, root = q.shape[2] ** -0.5, k.shape[1] ** -0.5
        dcov = outer_sum(q, grad) * (scale * root)
        dmean = grad.sum(1, keepdim=True, dtype=dcov.dtype) * root
        dq = torch.baddbmm(q, grad, covariance.transpose(1, 2).to(q.dtype), beta=0, alpha=scale)
        dk = _product(*_centred(v, value_mean), dcov.transpose(1, 2), torch.zeros_like(key_mean), root)
        dv = _product(*_centred(k, key_mean), dcov, dmean, root)
        return dq, dk, dv


def _centred(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """`x` without its mean and a mean of zero, or in half precision, where that would round, both as they are."""
    return (x, mean) if x.element_size() == 2 else (x - mean, torch.zeros_like(mean))


def _product(x: Tensor, mean: Tensor, matrix: Tensor, constant: Tensor, share: float) -> Tensor:
    """`share ((x - mean) matrix + constant)`."""
    return torch.baddbmm(((constant - mean @ matrix) * share).to(x.dtype), x, matrix.to(x.dtype), alpha=share)
