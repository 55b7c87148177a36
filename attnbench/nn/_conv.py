"""Depthwise convolutions over tokens: of the values, as many efficient attentions add them to their output, and of the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import pad

from attnbench.errors import UserError

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


class ShortConvolution(nn.Conv2d):
    """A convolution of each channel over a token and its neighbours, `[B, N, C]` -> `[B, N, C]`.

    Tokens in a row see `width` of them, around each or, where `causal`, up to it; tokens on a grid see a square of `width`^2. It spares a
    block the search for neighbours: in Arora et al. 2024, https://arxiv.org/abs/2402.18668, a convolution of width 3 is the first layer of
    every model that is asked for recall; on images it is the conditional encoding of positions of Chu et al. 2021,
    https://arxiv.org/abs/2102.10882.

    In a row it is a sum of products of shifted tokens, which a compiler fuses with what is around it, gradients too; on a grid it is the
    library's.

    Args:
        dim: channels C.
        width: neighbours along a side, odd unless causal.
        grid: (height, width) of the tokens, None for a sequence.
        causal: whether later tokens are out of sight.

    Raises:
        UserError: for a width that has no middle, or a causal grid.
    """

    def __init__(self, dim: int, width: int, *, grid: tuple[int, int] | None = None, causal: bool = False) -> None:
        if causal and grid:
            raise UserError("a short convolution over a grid sees later tokens: set short_conv = 0, or causal = false")
        if width % 2 == 0 and not causal:
            raise UserError(f"short_conv = {width} has no middle: set an odd width, such as 3")
        super().__init__(dim, dim, (width if grid else 1, width), groups=dim)
        rows, columns = (width // 2 if grid else 0), width // 2
        self.grid, self.margins = grid, (width - 1, 0, 0, 0) if causal else (columns, columns, rows, rows)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        if self.grid is None:
            return self._along(x)
        image = x.transpose(1, 2).unflatten(2, self.grid)
        out: Tensor = super().forward(pad(image, self.margins))
        return out.flatten(2).transpose(1, 2)

    def _along(self, x: Tensor) -> Tensor:
        """Of tokens in a row."""
        assert self.bias is not None
        seen, out = pad(x, (0, 0, *self.margins[:2])), self.bias
        for i, tap in enumerate(self.weight.flatten(1).unbind(1)):
            out = out + seen[:, i : i + x.shape[1]] * tap
        return out
