"""Rotary positions: pairs of neighbouring channels turn by an angle that grows with the position.

Pair i of P turns by `t theta^(-i / P)` at position t. Over a grid the first half of the pairs turns with the row and the second half with
the column. Su et al. 2021, https://arxiv.org/abs/2104.09864; the grid as in ViT-5, https://github.com/QishuaiWen/MiTA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


def angles(sizes: tuple[int, ...], dim: int, theta: float, prefix: int, device: torch.device) -> Tensor:
    """Angles `[prefix + N, D / 2]` in float64 of a sequence `(N,)` or a grid `(H, W)`; the prefix is not turned."""
    pairs = dim // 2 // len(sizes)
    frequencies = theta ** -(torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    places = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float64) for n in sizes), indexing="ij")
    turned = torch.cat([place.reshape(-1, 1) * frequencies for place in places], -1)
    return pad(turned, (0, 0, prefix, 0))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """`x: [B, H, N, D]` turned by `turns: [N, D / 2]`, in at least float32, in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = turns.cos().to(dtype), turns.sin().to(dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
