"""The depthwise convolution that many efficient attentions add to their output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


class DepthwiseConvolution(nn.Conv2d):
    """A 3 x 3 convolution of each channel over the grid of tokens; class and register tokens get zero.

    Parameters are those of `Conv2d(dim, dim, 3, padding=1, groups=dim)`: `weight [C, 1, 3, 3]` and `bias [C]`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def tokens(self, v: Tensor, sides: tuple[int, int]) -> Tensor:
        """Values `[B, H, N, D]`, of which the last height x width lie on the grid, to `[B, N, C]`."""
        count = sides[0] * sides[1]
        patches = v.transpose(1, 2).flatten(2)[:, v.shape[2] - count :]
        image = self(patches.transpose(1, 2).unflatten(2, sides))
        return pad(image.flatten(2).transpose(1, 2), (0, 0, v.shape[2] - count, 0))
