"""Tokens as a two-dimensional grid, row by row: for methods that convolve, sample or cut up images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

from attnbench.method import Params, param

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Shape


@dataclass(frozen=True, kw_only=True)
class GridParams(Params):
    """How tokens lie on a grid. Every token belongs to it: class and register tokens are the business of a layer."""

    grid: str = param("auto", "row-major grid of the tokens: `HxW`, or `auto`, the most nearly square one that N allows")

    def problems(self, shape: Shape) -> list[str]:
        """Adds a grid that is no grid, or that does not hold N tokens."""
        found = super().problems(shape)
        if self.grid != "auto" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.grid):
            return [*found, f"grid = {self.grid!r} is neither auto nor HxW such as 14x14"]
        height, width = self.sides(shape.n)
        if height * width != shape.n:
            found.append(f"grid = {self.grid} holds {height * width} tokens, not N = {shape.n}: change grid or N")
        return found

    def sides(self, n: int) -> tuple[int, int]:
        """Height and width; `auto` takes the largest divisor of N up to its square root as the height."""
        if self.grid == "auto":
            return _most_square(n)
        height, width = map(int, self.grid.split("x"))
        return height, width


@lru_cache(maxsize=256)
def _most_square(n: int) -> tuple[int, int]:
    height = next(h for h in range(isqrt(n), 0, -1) if n % h == 0)
    return height, n // height


def to_map(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """Tokens of each head as an image: `[B, H, N, D]` -> `[B H, D, height, width]`."""
    return x.transpose(-1, -2).reshape(-1, x.shape[-1], *sides)


def from_map(x: Tensor, heads: int) -> Tensor:
    """The inverse: `[B H, D, height, width]` -> `[B, H, N, D]`."""
    tokens = x.flatten(2).transpose(-1, -2)
    return tokens.reshape(-1, heads, *tokens.shape[1:])
