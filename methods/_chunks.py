"""Chunks of queries for implementations that never hold all scores: how large, their scores, and the backward pass of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.eager import masked_softmax, positions, wide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BUDGET_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""bytes that the intermediates of one chunk may take: small beside a GPU's memory, near the size of a CPU's caches"""


def rows_per_chunk(x: Tensor, bytes_per_row: int) -> int:
    """Queries (at least 1) whose intermediates fit the budget of the device of `x`."""
    return max(1, _BUDGET_BYTES.get(x.device.type, _BUDGET_BYTES["cpu"]) // max(1, bytes_per_row))


def row_chunks(x: Tensor, bytes_per_row: int) -> Iterator[slice]:
    """Runs of queries of `x: [B, H, N, D]` that `rows_per_chunk` allows."""
    step = rows_per_chunk(x, bytes_per_row)
    for start in range(0, x.shape[2], step):
        yield slice(start, min(start + step, x.shape[2]))


@torch.no_grad()
def chosen_by_rows(choose: Callable[[Tensor, Tensor], Tensor], q: Tensor, elements: int) -> Tensor:
    """`choose(q [B, H, R, D], positions [R]) -> [B, H, R, S]` for all N queries, some at a time, so that N x M scores never exist.

    `elements` are the numbers in at least float32 that a query needs in each head while it chooses.
    """
    step = rows_per_chunk(q, elements * q.shape[0] * q.shape[1] * wide(q[..., :0]).element_size())
    return torch.cat([choose(x, rows) for x, rows in zip(q.split(step, 2), positions(q, None).split(step), strict=True)], 2)


def wide_scores(q: Tensor, k: Tensor) -> Tensor:
    """`q k^T` `[B, H, R, M]` in at least float32, the heads of a group stacked so that k need not be repeated.

    Half precision on a GPU is multiplied as it is and added up in float32, which is exact but for the order of the sums.
    """
    b, h, r, d = q.shape
    fused = q.is_cuda and q.element_size() == 2 and hasattr(torch.ops.aten.bmm, "dtype")
    left = (q if fused else wide(q)).reshape(b * k.shape[1], -1, d)
    right = (k if fused else wide(k)).flatten(0, 1).transpose(1, 2)
    scores = torch.bmm(left, right, out_dtype=torch.float32) if fused else left @ right
    return scores.view(b, h, r, -1)


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
