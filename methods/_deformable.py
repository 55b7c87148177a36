"""Deformable attention in practice: a query's output is a weighted sum of the 4 P tokens around its points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import positions, wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._recompute import recomputed
from ._sampling import corners, mix
from .deformable import logits, places

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .deformable import DeformableParams

_COPIES = 16
"""tensors of 4 P numbers a query that are alive at once while its tokens and their weights are made"""


def chunked(q: Tensor, k: Tensor, v: Tensor, params: DeformableParams, weights: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG001
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Kept for the backward pass: q, v, and 4 P tokens and weights a query."""
    index, shares = _tokens(q, params, weights)
    with stage("gather"):
        return mix(v, index, shares)


def fused(q: Tensor, k: Tensor, v: Tensor, params: DeformableParams, weights: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG001
    """The same, by `attnbench.kernels.rows`."""
    from attnbench.kernels.rows import mix_rows

    index, shares = _tokens(q, params, weights)
    with stage("gather"):
        return mix_rows(v, index, shares)


def _tokens(q: Tensor, params: DeformableParams, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens, int32, and their weights, `[B, H, N, 4 P]` each."""
    own = {name: wide(x) for name, x in weights.items()}
    element = wide(q[..., :0]).element_size()
    size = rows_per_chunk(q, q.shape[0] * q.shape[1] * element * (2 * q.shape[3] + _COPIES * 4 * params.points))
    rows = positions(q, None)
    with stage("project"):
        parts = [recomputed(_part, a, b, params, own, q.shape[2]) for a, b in zip(q.split(size, 2), rows.split(size), strict=True)]
        index, shares = zip(*parts, strict=True)
        return torch.cat(index, 2), torch.cat(shares, 2)


def _part(q: Tensor, rows: Tensor, params: DeformableParams, own: Mapping[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    index, weights = corners(*places(q, rows, params, own, n), params.sides(n))
    return index.flatten(3).int(), (logits(q, own).softmax(-1).unsqueeze(-1) * weights).flatten(3)
