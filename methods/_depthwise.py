"""A convolution of each channel over a grid of tokens, which many methods add to their output to keep what is local."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import conv2d

from ._grid import from_map, to_map

if TYPE_CHECKING:
    from torch import Tensor


def depthwise(v: Tensor, kernel: Tensor, sides: tuple[int, int]) -> Tensor:
    """`v: [B, H, N, D]` convolved channel by channel, zero beyond the grid: kernels `[H, D, S, S]`, or `[B, H, D, S, S]` of each input."""
    batch, heads = v.shape[:2]
    image = to_map(v, sides)
    image = image.reshape(1 if kernel.ndim == 5 else batch, -1, *sides)
    size = kernel.shape[-1]
    out = conv2d(image, kernel.reshape(-1, 1, size, size), padding=size // 2, groups=image.shape[1])
    return from_map(out.reshape(batch * heads, -1, *sides), heads)
