"""The part of a call that the gate compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Method

_SCORES = 1 << 27
"""scores of all sampled queries and heads, at most: those of 256 queries in two heads with 262144 keys, 1 GiB in float64"""
_LEAST_ROWS = 16
"""queries a head that are compared however many keys there are"""


@dataclass(frozen=True)
class Sample:
    """The part of a call that is compared: one batch element, a few heads, some queries."""

    batch: int
    heads: Tensor
    kv_heads: Tensor
    """the key heads that those heads read"""
    rows: Tensor | None
    """positions; None means all"""

    def output(self, out: Tensor) -> Tensor:
        """`[1, h, R, Dv]` of `[B, H, N, Dv]`."""
        picked = out[self.batch : self.batch + 1, self.heads]
        return picked if self.rows is None else picked[:, :, self.rows]


def sampled(method: Method, q: Tensor, k: Tensor, rows: int) -> Sample:
    """The last batch element at its first and last head, or at all where heads are coupled or parameters learned, and `rows` queries.

    Fewer where their scores would not fit. The first and the last are among them, and the same are taken whenever N is the same.
    """
    batch, heads, n = q.shape[:3]
    whole = method.couples_heads or method.weights is not None
    picked = torch.arange(heads, device=q.device) if whole else torch.tensor(sorted({0, heads - 1}), device=q.device)
    read = (picked * k.shape[1] // heads).unique()
    rows = min(rows, max(_LEAST_ROWS, _SCORES // (len(picked) * k.shape[2])))
    if n <= rows or not method.takes_rows:
        return Sample(batch - 1, picked, read, None)
    inner = 1 + torch.randperm(n - 2, generator=torch.Generator().manual_seed(n))[: rows - 2].sort().values
    return Sample(batch - 1, picked, read, torch.cat([torch.tensor([0]), inner, torch.tensor([n - 1])]).to(q.device))


def output_gradient(q: Tensor, v: Tensor, sample: Sample) -> Tensor:
    """A gradient `[B, H, N, Dv]` that is random on the sample and zero elsewhere, so that sampling stays exact."""
    grad = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    rows = torch.arange(q.shape[2], device=q.device) if sample.rows is None else sample.rows
    values = torch.randn(len(sample.heads), len(rows), v.shape[-1], generator=torch.Generator().manual_seed(1))
    grad[sample.batch, sample.heads[:, None], rows] = values.to(q)
    return grad
