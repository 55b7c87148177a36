"""Landmark queries: adaptive averages of the queries, over the sequence or over a two-dimensional grid of tokens.

Bin i of m over n tokens is `[floor(i n / m), ceil((i + 1) n / m))`, as in torch's AdaptiveAvgPool: bins overlap by a token where m does
not divide n.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, Self

import torch

from attnbench.method import Params, param
from attnbench.stages import stage

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Shape


@dataclass(frozen=True, kw_only=True)
class LandmarkParams(Params):
    """How many landmarks there are and which tokens they average."""

    landmarks: int = param(25, "landmark queries; a square number on a grid", unit="tokens", low=1, at_most="n")
    grid: str = param("none", "how tokens are averaged: `none` along the sequence, `square` or `HxW` over a row-major grid of tokens")
    prefix: int = param(0, "class and register tokens before the others, which no landmark averages", unit="tokens", low=0)
    legacy_cls_shift: bool = param(False, "average the first N - prefix tokens, not the last: the grid then starts at the class token")

    def problems(self, shape: Shape) -> list[str]:
        """Adds a grid that does not fit the tokens, and landmarks that do not fit the grid."""
        found, tokens = super().problems(shape), shape.n - self.prefix
        if tokens < 1:
            return [*found, f"prefix = {self.prefix} leaves none of N = {shape.n} tokens: lower prefix"]
        if tokens < self.landmarks <= shape.n:
            found.append(f"landmarks = {self.landmarks} exceeds the {tokens} tokens after the prefix: lower landmarks")
        if self.legacy_cls_shift and (self.grid == "none" or not self.prefix):
            found.append("legacy_cls_shift shifts a grid by the prefix: set grid and prefix = 1")
        return found + ([] if self.grid == "none" else self._grid_problems(tokens))

    def _grid_problems(self, tokens: int) -> list[str]:
        found = []
        if not re.fullmatch(r"square|[1-9]\d*x[1-9]\d*", self.grid):
            return [f"grid = {self.grid!r} is none of none, square or HxW such as 14x14"]
        height, width = self.sides(tokens)
        if height * width != tokens:
            what = "a square number" if self.grid == "square" else f"{height} x {width} = {height * width}"
            found.append(f"grid = {self.grid} needs N - prefix to be {what}, not {tokens}: change N, grid or prefix")
        if isqrt(self.landmarks) ** 2 != self.landmarks:
            found.append(f"landmarks = {self.landmarks} is not a square number: a grid is averaged to P x P landmarks")
        return found

    def fitted(self, shape: Shape) -> Self:
        """Clamps landmarks to the tokens after the prefix too, and to a square number on a grid."""
        fit = super().fitted(shape)
        count = max(1, min(fit.landmarks, shape.n - fit.prefix))
        return replace(fit, landmarks=count if fit.grid == "none" else isqrt(count) ** 2)

    def sides(self, tokens: int) -> tuple[int, int]:
        """Height and width of the grid."""
        if self.grid == "square":
            return isqrt(tokens), isqrt(tokens)
        height, _, width = self.grid.partition("x")
        return int(height), int(width)


def landmark_budget(params: LandmarkParams, units: int) -> int:
    """The number of landmarks nearest to `units` that the grid of `params` allows."""
    return max(1, units) if params.grid == "none" else max(1, round(units**0.5)) ** 2


def bins(n: int, count: int) -> list[tuple[int, int]]:
    """First token and end of each of `count` adaptive bins over n tokens."""
    return [(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]


def pool(x: Tensor, count: int, dim: int) -> Tensor:
    """Adaptive averages along the non-negative axis `dim`: n -> `count`, added up in at least float32."""
    n, dtype = x.shape[dim], torch.promote_types(x.dtype, torch.float32)
    if n % count == 0:
        return x.reshape(*x.shape[:dim], count, -1, *x.shape[dim + 1 :]).mean(dim + 1, dtype=dtype)
    i = torch.arange(count, device=x.device)
    start, end = i * n // count, -(-(i + 1) * n // count)
    tokens = start[:, None] + torch.arange(max(b - a for a, b in bins(n, count)), device=x.device)
    after = [1] * (x.ndim - dim - 1)
    member = (tokens < end[:, None]).view(*tokens.shape, *after)
    taken = x.index_select(dim, tokens.clamp(max=n - 1).flatten()).reshape(*x.shape[:dim], *member.shape[:2], *x.shape[dim + 1 :])
    total: Tensor = (taken * member).sum(dim + 1, dtype=dtype)
    return total / (end - start).view(-1, *after)


def landmarks(q: Tensor, params: LandmarkParams) -> Tensor:
    """Landmark queries `[B, H, M, D]` of `q: [B, H, N, D]`, in the dtype of q."""
    count = q.shape[2] - params.prefix
    tokens = q[:, :, :count] if params.legacy_cls_shift else q[:, :, params.prefix :]
    with stage("pool"):
        if params.grid == "none":
            return pool(tokens, params.landmarks, 2).to(q.dtype)
        side = isqrt(params.landmarks)
        columns = pool(tokens.reshape(*q.shape[:2], *params.sides(count), -1), side, 3)
        return pool(columns, side, 2).flatten(2, 3).to(q.dtype)


def pool_flops(shape: Shape, params: LandmarkParams) -> int:
    """Additions of the averages of all heads: every token once for each bin it is in."""
    tokens = shape.n - params.prefix
    if params.grid == "none":
        members = sum(b - a for a, b in bins(tokens, params.landmarks))
    else:
        side, (height, width) = isqrt(params.landmarks), params.sides(tokens)
        across = sum(b - a for a, b in bins(width, side))
        members = height * across + side * sum(b - a for a, b in bins(height, side))
    return shape.batch * shape.heads * members * shape.dim
