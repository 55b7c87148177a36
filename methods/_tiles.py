"""Tokens cut into blocks of neighbours: runs of the sequence, or tiles of a row-major grid.

Row i of a rows of tiles over h rows of tokens is `[floor(i h / a), floor((i + 1) h / a))`, columns likewise: where they do not divide,
tiles differ by a token in height or width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, NamedTuple

import torch

from ._constants import constant

if TYPE_CHECKING:
    from torch import Tensor


class Uneven(NamedTuple):
    """How tokens and places of tiles of several sizes are mapped to each other."""

    taken: Tensor
    """token `[m T]` of each place, any for one that fills up"""
    filling: Tensor
    """`[1, m T, 1]`: whether a place fills up"""
    slots: Tensor
    """place `[N]` of each token"""


@dataclass(frozen=True)
class Tiles:
    """`rows x columns` tiles of `height x width` tokens; a sequence is a grid one token high."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, sides: tuple[int, int], count: int) -> Tiles | None:
        """The `count` tiles that are most nearly square, wide ones before high ones; None where no rows and columns of so many fit."""
        height, width = sides
        fits = [(r, count // r) for r in range(1, min(count, height) + 1) if count % r == 0 and count // r <= width]
        best = max(fits, key=lambda x: (-abs(log(height * x[1] / (width * x[0]))), x), default=None)
        return None if best is None else cls(height, width, *best)

    @property
    def count(self) -> int:
        """m."""
        return self.rows * self.columns

    @property
    def even(self) -> bool:
        """Whether all tiles have one size."""
        return self.height % self.rows == 0 and self.width % self.columns == 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest tile."""
        return -(-self.height // self.rows), -(-self.width // self.columns)

    def centres(self) -> Tensor:
        """Row and column of each tile among the tiles `[m, 2]`, in float64."""
        return torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.columns)).double()

    def owner(self, device: torch.device) -> Tensor:
        """The tile `[N]` of each token."""
        down, across = (_owner(*pair, device) for pair in self._sides())
        return (down[:, None] * self.columns + across).flatten()

    def places(self, device: torch.device) -> Tensor:
        """Tokens `[m, T]` of each tile, row by row; -1 fills the smaller ones up."""
        (row, high), (column, wide) = (_runs(*pair, device) for pair in self._sides())
        place = row[:, None, :, None] * self.width + column[:, None, :]
        there = high[:, None, :, None] & wide[:, None, :]
        return place.masked_fill(~there, -1).flatten(2).flatten(0, 1)

    def slots(self, device: torch.device) -> Tensor:
        """Where each token `[N]` lies among the `m T` places."""
        down, across = (_owner(*pair, device) for pair in self._sides())
        row = torch.arange(self.height, device=device) - down * self.height // self.rows
        column = torch.arange(self.width, device=device) - across * self.width // self.columns
        high, wide = self.size
        return ((down * self.columns * high + row)[:, None] * wide + across * high * wide + column).flatten()

    def cut(self, x: Tensor) -> Tensor:
        """Tokens `[X, N, D]` by tile, `[X, rows, columns, T, T', D]`: a view of even tiles, else a copy in which zeros fill up."""
        if self.even:
            return x.view(len(x), self.rows, self.size[0], self.columns, self.size[1], x.shape[2]).transpose(2, 3)
        map_ = self.uneven(x.device)
        taken = x.index_select(1, map_.taken).masked_fill_(map_.filling, 0.0)
        return taken.view(len(x), self.rows, self.columns, *self.size, x.shape[2])

    def put(self, x: Tensor, tiles: Tensor) -> None:
        """Copy `tiles`, of as many elements as `cut(x)`, back to the tokens `x: [X, N, D]`."""
        if self.even:
            self.cut(x).copy_(tiles.reshape(len(x), self.rows, self.columns, *self.size, x.shape[2]))
        else:
            torch.index_select(tiles.reshape(len(x), -1, x.shape[2]), 1, self.uneven(x.device).slots, out=x)

    def uneven(self, device: torch.device) -> Uneven:
        """The maps that `cut` and `put` need where tiles differ in size, made once."""

        def make() -> Uneven:
            place = self.places(device).flatten()
            return Uneven(place.clamp(min=0), (place < 0).view(1, -1, 1), self.slots(device))

        return constant(make, device, "uneven tiles", self)

    def _sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.height, self.rows), (self.width, self.columns)


def _owner(n: int, count: int, device: torch.device) -> Tensor:
    """The run `[n]` that holds each position, of `count` runs."""
    return ((torch.arange(n, device=device) + 1) * count - 1) // n


def _runs(n: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions `[count, T]` of each run, and which of them are in it."""
    edges = torch.arange(count + 1, device=device) * n // count
    place = edges[:-1, None] + torch.arange(-(-n // count), device=device)
    return place, place < edges[1:, None]
