"""Building blocks of readable references: heads, positions and softmax over chosen keys.

Everything here is eager, differentiable and works in any float dtype, float64 included.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: the precision in which selection scores and softmax are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the `Hkv` heads of k and v to the `H` heads of q."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def positions(q: Tensor, rows: Tensor | None) -> Tensor:
    """Positions `[R]` of the queries asked for: `rows`, or all N."""
    return torch.arange(q.shape[2], device=q.device) if rows is None else rows


def take(q: Tensor, rows: Tensor | None) -> Tensor:
    """The queries asked for, `[B, H, R, D]`."""
    return q if rows is None else q[:, :, rows]


def causal_mask(rows: Tensor, keys: int) -> Tensor:
    """`[R, M]`, True where key j is at or before query position i."""
    return torch.arange(keys, device=rows.device) <= rows[:, None]


def masked_softmax(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the last axis, computed in at least float32, zero where `mask` is False and in rows it empties."""
    logits = wide(logits)
    if mask is None:
        return logits.softmax(-1)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.masked_fill(~mask, 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """`softmax(scale q k^T) v` over the keys that `mask` (broadcast to `[B, H, R, M]`) allows."""
    return masked_softmax(scale * (q @ k.transpose(-1, -2)), mask).to(v.dtype) @ v
