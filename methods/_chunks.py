"""Chunks of queries for implementations that never hold all scores: how large, and the backward pass of one."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.eager import masked_softmax, wide

_BUDGET_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""bytes that the intermediates of one chunk may take: small beside a GPU's memory, near the size of a CPU's caches"""


def rows_per_chunk(x: Tensor, bytes_per_row: int) -> int:
    """Queries (at least 1) whose intermediates fit the budget of the device of `x`."""
    return max(1, _BUDGET_BYTES[x.device.type] // max(1, bytes_per_row))


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend(q, k, v, scale, mask)` where its output has gradient `grad`, from scores computed anew.

    With `p = softmax(scale q k^T)` and `dp = grad v^T`, the gradient of the scores is `p (dp - sum_j p dp)`.
    """
    p = masked_softmax(scale * (q @ k.transpose(-1, -2)), mask)
    dp = wide(grad @ v.transpose(-1, -2))
    ds = (scale * p * (dp - (p * dp).sum(-1, keepdim=True))).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ grad


def zeros_wide(x: Tensor) -> Tensor:
    """Zeros of the shape of `x` in at least float32: an accumulator of gradients."""
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
