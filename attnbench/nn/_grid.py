"""Grids of tokens: the H x W tokens that follow the class and register tokens, row by row."""

from __future__ import annotations

import re
from math import isqrt

from attnbench.errors import UserError

Grid = tuple[int, int] | str | None
"""Height and width, as a pair or as text such as `14x14`; `square` takes them from the number of tokens; None and any other word, which
the method may know, are no grid of the layer."""
SQUARE = "square"


def read(grid: Grid) -> Grid:
    """A pair where height and width are given. Raises `UserError` for what is no grid."""
    if isinstance(grid, str) and (match := re.fullmatch(r"(\d+)x(\d+)", grid)):
        grid = int(match[1]), int(match[2])
    if isinstance(grid, tuple) and (len(grid) != 2 or not all(isinstance(x, int) and x > 0 for x in grid)):
        raise UserError(f"grid = {grid} is no height and width: give two whole numbers such as (14, 14)")
    return grid


def is_known(grid: Grid) -> bool:
    """Whether the layer itself knows how the tokens lie."""
    return isinstance(grid, tuple) or grid == SQUARE


def sides(grid: Grid, tokens: int) -> tuple[int, int]:
    """Height and width of a known grid of so many tokens. Raises `UserError` where they do not fit."""
    height, width = grid if isinstance(grid, tuple) else (isqrt(tokens), isqrt(tokens))
    if height * width != tokens:
        need = f"{height} x {width} = {height * width}" if isinstance(grid, tuple) else "a square number"
        raise UserError(f"grid = {grid} needs N - prefix to be {need}, not {tokens}: change N, grid or prefix")
    return height, width


def text(grid: Grid) -> str:
    """As the parameters of a method write it."""
    return f"{grid[0]}x{grid[1]}" if isinstance(grid, tuple) else str(grid)
