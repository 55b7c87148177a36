"""Matrix products over many tokens: summed in float32 whatever the inputs, and cut so that a whole GPU has work."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.eager import wide

_SUMMED = 1024
"""tokens summed by one product, about: a sum over all N in one product would leave most of a GPU idle"""


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of `a: [X, I, J]` and `b: [X, J, K]` in at least float32, without rounding half-precision products on the way."""
    if a.is_cuda and a.element_size() == 2 and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(wide(a), wide(b))


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a^T b` `[..., D, E]` in at least float32 of `a: [..., N, D]` and `b: [..., N, E]`, as a sum over runs of rows."""
    runs = divisor(a.shape[-2], a.shape[-2] // _SUMMED)
    left, right = (x.reshape(-1, x.shape[-2] // runs, x.shape[-1]) for x in (a, b))
    products = wide_bmm(left.transpose(1, 2), right)
    if runs == 1:
        return products.view(*a.shape[:-2], *products.shape[1:])
    return products.view(*a.shape[:-2], runs, *products.shape[1:]).sum(-3)


def divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`; 1 where `most` is less."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)
