"""The depthwise convolution that many efficient attentions add to their output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import pad

from ._grid import sides

if TYPE_CHECKING:
    from torch import Tensor

    from ._grid import Grid


class DepthwiseConvolution(nn.Conv2d):
    """A 3 x 3 convolution of each channel over the grid of tokens; class and register tokens get zero.

    Parameters are those of `Conv2d(dim, dim, 3, padding=1, groups=dim)`: `weight [C, 1, 3, 3]` and `bias [C]`.
    """

    def __init__(self, dim: int, prefix: int, grid: Grid) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.prefix, self.grid = prefix, grid

    def forward(self, v: Tensor) -> Tensor:
        """Values `[B, H, N, D]` to `[B, N, C]`."""
        tokens = v.transpose(1, 2).flatten(2)[:, self.prefix :]
        image = tokens.transpose(1, 2).unflatten(2, sides(self.grid, tokens.shape[1]))
        return pad(super().forward(image).flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))
