"""Sizes of tiles, runs and buffers, from the shape alone: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .._define import power


@dataclass(frozen=True)
class Plan:
    """Launch sizes of one shape; `*_warps` are warps a program."""

    prec: str
    """precision of products of float32: three tensor-core products make up one, to about 2^-21; 16-bit types ignore it"""
    dim: int
    dim_v: int
    """head dimensions padded to a power of two"""
    tile: int
    """queries a tile"""
    block: int
    """keys a tile"""
    run: int
    """pairs of a block that one program attends to"""
    grad_tile: int
    """queries a tile of the kernels of gradients"""
    grad_run: int
    """pairs of a block over which one program sums gradients of keys"""
    rows: int
    """queries a program of the kernels that merge and add up"""
    warps: int
    query_warps: int
    """of the kernel of gradients of the queries of pairs"""
    grad_warps: int

    def items(self, pairs: int, blocks: int) -> int:
        """Bound on the runs of pairs of a route head."""
        return pairs // self.run + min(blocks, pairs)

    def grad_items(self, pairs: int, blocks: int) -> int:
        """The same for gradients of keys."""
        return pairs // self.grad_run + min(blocks, pairs)


@lru_cache(maxsize=256)
def plan(pairs: int, blocks: int, width: int, d: int, dv: int, fp32: bool) -> Plan:
    """The plan for `pairs` of one route head with `blocks` blocks of `width` keys.

    A block that fits a tile stays in registers for a run of some tiles; a larger one is read again for each tile, which then is larger.
    Runs over which gradients of keys are summed are four times the average of a block, so that few blocks have several.
    """
    dim, dim_v = max(16, power(d)), max(16, power(dv))
    big = max(dim, dim_v) > 64
    block = min(32 if fp32 else 64, max(16, power(width)))
    tile = 32 if fp32 else 64 if width <= block else 128
    average = power(pairs / blocks)
    return Plan(
        prec="tf32x3" if fp32 else "tf32", dim=dim, dim_v=dim_v, tile=tile, block=block,
        run=tile if width > block else min(4 * tile, max(tile, average)), grad_tile=32 if fp32 or big else 64,
        grad_run=max(4 * average, 4), rows=32 if big else 64, warps=8 if tile * max(dim, dim_v) > 64 * 128 else 4,
        query_warps=8 if tile > 64 or (big and not fp32) else 4, grad_warps=8 if big and not fp32 else 4,
    )  # fmt: skip


def region_tile(width: int, fp32: bool) -> int:
    """Queries a tile where all queries of a region of `width` tokens read the same."""
    return min(32 if fp32 else 64, max(16, power(width)))
