"""Tokens in regions: squares of neighbouring tokens on a grid, or runs of a sequence. What they do not divide ends in short regions."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from attnbench.method import param

from ._constants import constant
from ._grid import GridParams

if TYPE_CHECKING:
    from attnbench.method import Params, Shape

LINE = "line"
"""The `grid` of tokens that lie in a sequence."""


@dataclass(frozen=True, kw_only=True)
class RegionParams(GridParams):
    """How tokens lie, and how large a region of them is: a method names its own field and returns it as `size`."""

    grid: str = param(
        "auto", "row-major grid of the tokens: `HxW`, `auto`, the most nearly square one that N allows, or `line`, a sequence"
    )

    @property
    def size(self) -> int:
        """Tokens in a whole region: on a grid a square number."""
        raise NotImplementedError

    def problems(self, shape: Shape) -> list[str]:
        """Adds a grid that does not hold N tokens, and a region that is no square on a grid."""
        if self.grid == LINE:
            return super(GridParams, self).problems(shape)
        found, side = super().problems(shape), isqrt(max(0, self.size))
        if self.size != side**2:
            near = f"{side**2} or {(side + 1) ** 2}" if side else "1"
            found.append(f"a region of {self.size} tokens is no square: give {near}, or grid = line")
        return found

    def sides(self, n: int) -> tuple[int, int]:
        """Height and width of the grid; of a sequence, 1 and N."""
        return (1, n) if self.grid == LINE else super().sides(n)

    def tile(self, n: int) -> tuple[int, int]:
        """Height and width of a whole region; a side of the grid that is shorter bounds it."""
        if self.grid == LINE:
            return 1, min(self.size, n)
        height, width = self.sides(n)
        return min(isqrt(self.size), height), min(isqrt(self.size), width)

    def spans(self, n: int) -> tuple[list[int], list[int]]:
        """Heights of the rows of regions, and widths of their columns."""
        (height, width), (a, b) = self.sides(n), self.tile(n)
        return [min(a, height - i) for i in range(0, height, a)], [min(b, width - i) for i in range(0, width, b)]

    def areas(self, n: int) -> list[int]:
        """Tokens of each region, row by row."""
        down, across = self.spans(n)
        return [a * b for a in down for b in across]


class Regions(NamedTuple):
    """The tokens of each region, and the region of each token. Regions and their tokens are in row-major order."""

    members: Tensor
    """`[E, W]` tokens of each region, -1 where it is short"""
    place: Tensor
    """`[N]` where a token lies in `members`, flat"""
    whole: tuple[int, int, int, int] | None
    """regions down, height of one, regions across, width of one, where all are whole"""

    @classmethod
    def of(cls, params: RegionParams, n: int, device: torch.device) -> Self:
        """The regions of N tokens."""
        (height, width), (a, b) = params.sides(n), params.tile(n)
        y, x = (torch.arange(-(-side // step) * step, device=device).view(-1, step) for side, step in ((height, a), (width, b)))
        token = y[:, None, :, None] * width + x[None, :, None, :]
        absent = (y >= height)[:, None, :, None] | (x >= width)[None, :, None, :]
        members = token.masked_fill(absent, -1).reshape(-1, a * b)
        place = torch.empty(n + 1, dtype=torch.long, device=device)
        place[members.flatten()] = torch.arange(members.numel(), device=device)  # -1, the last, takes what is absent
        whole = None if height % a or width % b else (height // a, a, width // b, b)
        return cls(members, place[:n], whole)

    @property
    def width(self) -> int:
        """W, tokens of a whole region."""
        return self.members.shape[1]

    @property
    def owner(self) -> Tensor:
        """`[N]` region of each token."""
        return self.place // self.width

    @property
    def lengths(self) -> Tensor:
        """`[E]` tokens of each region."""
        return (self.members >= 0).sum(1)

    def wanted(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Regions `[U]` that hold the queries at `rows` (None: all), and `[R]` where in `members[U]`, flat, each of those queries lies."""
        if rows is None:
            return torch.arange(self.members.shape[0], device=self.members.device), self.place
        regions, which = self.owner[rows].unique(return_inverse=True)
        return regions, which * self.width + self.place[rows] % self.width


def laid_out(params: RegionParams, n: int, device: torch.device) -> Regions:
    """`Regions.of`, with members in int32, or what it gave before."""

    def make() -> Regions:
        regions = Regions.of(params, n, device)
        return regions._replace(members=regions.members.to(torch.int32).contiguous())

    return constant(make, device, "regions", params.sides(n), params.tile(n))


def at(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows `tokens: [...]` of `x: [B, H, N, D]`, the first where a token is absent: `[B, H, ..., D]`."""
    return x[:, :, tokens.clamp(min=0)]


def region_means(x: Tensor, regions: Regions) -> Tensor:
    """Mean of each region, `[B, H, N, D]` -> `[B, H, E, D]` in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if regions.whole:
        means: Tensor = x.unflatten(2, regions.whole).mean((3, 5), dtype=dtype)
        return means.flatten(2, 3)
    present = (regions.members >= 0).unsqueeze(-1)
    total: Tensor = at(x, regions.members).masked_fill(~present, 0.0).sum(3, dtype=dtype)
    return total / regions.lengths[:, None]


def share_reason(params: Params, shape: Shape, most: int, device: str) -> list[str]:
    """Why so many regions are too many for one call of a library kernel."""
    assert isinstance(params, RegionParams)
    count = len(params.areas(shape.n))
    return [f"{count} regions exceed the {most} of one call: enlarge them"] if device == "cuda" and count > most else []
