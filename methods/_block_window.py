"""Window attention by scaled_dot_product_attention, a batch for each size of windows, or by fused kernels."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch

from attnbench.eager import expand_heads
from attnbench.sdpa import attention
from attnbench.stages import stage

from ._constants import constant
from ._regions import laid_out
from .block_window import pair_bias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .block_window import BlockWindowParams


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: BlockWindowParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`: one call where windows divide the grid, up to four where they do not."""
    k, v = expand_heads(q, k, v)
    sides = params.sides(q.shape[2])
    pieces = list(_pieces(sides, params.tile(q.shape[2])))
    if len(pieces) == 1:
        return _attend((q, k, v), pieces[0], params, weights).flatten(2, 3)
    out = q.new_empty(*q.shape[:2], *sides, v.shape[3])
    for piece in pieces:
        out[:, :, piece.rows, piece.columns] = _attend((q, k, v), piece, params, weights)
    return out.flatten(2, 3)


def fused(q: Tensor, k: Tensor, v: Tensor, params: BlockWindowParams, weights: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG001
    """The same without biases by `attnbench.kernels.blocks`, which makes no copies."""
    from attnbench.kernels.blocks import attend_regions

    with stage("permute"):
        members = laid_out(params, q.shape[2], q.device).members
        own = constant(lambda: _each(q.shape[0], members), q.device, "windows", q.shape[0], len(members))
        return attend_regions(q, k, v, own, members, causal=params.causal)


def _each(batch: int, members: Tensor) -> Tensor:
    """`[B, E, 1]`: each window reads itself."""
    return torch.arange(len(members), device=members.device, dtype=torch.int32).expand(batch, -1).unsqueeze(2).contiguous()


class _Piece(NamedTuple):
    """A part of the grid that windows of one size divide."""

    sides: tuple[int, int]
    """of the whole grid"""
    rows: slice
    columns: slice
    tile: tuple[int, int]
    """height and width of a window"""

    @property
    def counts(self) -> tuple[int, int]:
        """Windows down and across."""
        return (self.rows.stop - self.rows.start) // self.tile[0], (self.columns.stop - self.columns.start) // self.tile[1]

    def split(self, x: Tensor) -> Tensor:
        """`[B, H, N, D]` -> `[B H, windows, tokens, D]`."""
        (down, across), (a, b) = self.counts, self.tile
        part = x.unflatten(2, self.sides)[:, :, self.rows, self.columns].flatten(0, 1)
        windows = part.unflatten(2, (across, b)).unflatten(1, (down, a)).transpose(2, 3)
        flat: Tensor = windows.reshape(part.shape[0], down * across, a * b, x.shape[3])
        return flat

    def join(self, x: Tensor, heads: int) -> Tensor:
        """The inverse: `[B H, windows, tokens, D]` -> `[B, H, rows, columns, D]`."""
        (down, across), (a, b) = self.counts, self.tile
        return x.view(x.shape[0], down, across, a, b, -1).transpose(2, 3).reshape(-1, heads, down * a, across * b, x.shape[3])


def _pieces(sides: tuple[int, int], tile: tuple[int, int]) -> Iterator[_Piece]:
    for (rows, a), (columns, b) in product(*(_runs(side, step) for side, step in zip(sides, tile, strict=True))):
        yield _Piece(sides, rows, columns, (a, b))


def _runs(side: int, step: int) -> list[tuple[slice, int]]:
    """The part of a side that whole windows fill, and what is left of it, each with the length of a window there."""
    whole = side // step * step
    return [(slice(0, whole), step)] + ([(slice(whole, side), side - whole)] if whole < side else [])


def _attend(qkv: tuple[Tensor, Tensor, Tensor], piece: _Piece, params: BlockWindowParams, weights: Mapping[str, Tensor]) -> Tensor:
    with stage("permute"):
        queries, keys, values = (piece.split(x) for x in qkv)
    with stage("attend"):
        out = attention(queries, keys, values, _mask(piece, params, weights, qkv[0].shape[0]), causal=_is_causal(params))
    with stage("permute"):
        return piece.join(out, qkv[0].shape[1])


def _is_causal(params: BlockWindowParams) -> bool:
    return params.causal and not params.bias


def _mask(piece: _Piece, params: BlockWindowParams, weights: Mapping[str, Tensor], batch: int) -> Tensor | None:
    """Biases `[B H, 1, tokens, tokens]`, -inf in the future where causal; None without biases."""
    if not params.bias:
        return None
    bias = pair_bias(weights["bias"], *piece.tile)
    if params.causal:
        bias = bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    return bias.unsqueeze(1).repeat(batch, 1, 1, 1)
