"""Grids of tokens: the H x W tokens that follow the class and register tokens, row by row."""

from __future__ import annotations

from math import isqrt
from typing import Literal

from attnbench.errors import UserError

Grid = tuple[int, int] | Literal["square"] | None
"""Height and width; `square` takes them from the number of tokens; None is a sequence."""


def check(grid: Grid) -> None:
    """Raises `UserError` for what is no grid."""
    sizes = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(x, int) and x > 0 for x in grid)
    if not (grid is None or grid == "square" or sizes):
        raise UserError(f"grid = {grid!r} is none of None, 'square' and (height, width) such as (14, 14)")


def sides(grid: Grid, tokens: int) -> tuple[int, int]:
    """Height and width of a grid of so many tokens. Raises `UserError` where they do not fit."""
    height, width = grid if isinstance(grid, tuple) else (isqrt(tokens), isqrt(tokens))
    if height * width != tokens:
        shape = f"{height} x {width} = {height * width}" if isinstance(grid, tuple) else "a square number"
        raise UserError(f"grid = {grid!r} needs {shape} tokens after the prefix, not {tokens}: change N, grid or prefix")
    return height, width


def text(grid: Grid) -> str:
    """As the parameters of a method write it: `none`, `square` or `HxW`."""
    return "none" if grid is None else grid if isinstance(grid, str) else f"{grid[0]}x{grid[1]}"
