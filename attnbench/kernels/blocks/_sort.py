"""Pairs of query and block sorted by block, and blocks cut into runs of pairs: integers alone, few launches, nothing read back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._define import power

_TILE = 1024
"""numbers a program takes at a time"""


@triton.jit
def number_kernel(routes, ids, P, E, NONE, TILES, BP: tl.constexpr):
    """Blocks of pairs, counted on over route heads; NONE for no block."""
    i_x = (tl.program_id(0) // TILES).to(tl.int64)
    o_p = (tl.program_id(0) % TILES) * BP + tl.arange(0, BP)
    b_e = tl.load(routes + i_x * P + o_p, mask=o_p < P, other=-1)
    b_id = tl.where(b_e < 0, NONE, b_e + i_x.to(tl.int32) * E)
    tl.store(ids + i_x * P + o_p, b_id.to(ids.dtype.element_ty), mask=o_p < P)


@triton.jit
def bounds(p_list, b_x, length, STEPS):
    """How many of the first `length` numbers of an ascending list are below `b_x`; `2^STEPS > length`."""
    b_low, b_high = tl.zeros_like(b_x), tl.zeros_like(b_x) + length
    for _ in range(STEPS):
        b_mid = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_below = m_open & (tl.load(p_list + b_mid, mask=m_open, other=0).to(tl.int32) < b_x)
        b_low = tl.where(m_below, b_mid + 1, b_low)
        b_high = tl.where(m_open & (m_below == 0), b_mid, b_high)
    return b_low


@triton.jit
def start_kernel(ordered, start, X, E, LENGTH, STEPS, BE: tl.constexpr):
    """First pair of each block, and of what comes after the last of a route head: `[X, E + 1]`."""
    o = tl.program_id(0) * BE + tl.arange(0, BE)
    m_o = o < X * (E + 1)
    b_id = tl.where(m_o, o - o // (E + 1), 0)
    tl.store(start + o, bounds(ordered, b_id, LENGTH, STEPS), mask=m_o)


@triton.jit
def item_kernel(start, edges, table, E, MOST, run, STEPS, BE: tl.constexpr):
    """Runs of pairs of one route head: how many there are before each block, and block, first pair and end of each."""
    i_x = tl.program_id(0).to(tl.int64)
    p_start, p_edge, p_item = start + i_x * (E + 1), edges + i_x * (E + 1), table + i_x * MOST * 3
    o = tl.arange(0, BE)
    total = tl.sum(tl.zeros([BE], tl.int32), 0)
    for first in range(0, E, BE):
        o_e = first + o
        m_e = o_e < E
        b_pairs = tl.load(p_start + o_e + 1, mask=m_e, other=0) - tl.load(p_start + o_e, mask=m_e, other=0)
        b_runs = (b_pairs + (run - 1)) // run
        tl.store(p_edge + o_e, total + tl.cumsum(b_runs, 0) - b_runs, mask=m_e)
        total += tl.sum(b_runs, 0)
    tl.store(p_edge + E, total)
    tl.debug_barrier()
    for first in range(0, MOST, BE):
        o_i = first + o
        m_i = o_i < MOST
        # the last block whose runs begin at or before this one; beyond the last run, an empty one of the last block
        b_e = tl.minimum(bounds(p_edge + 1, o_i + 1, E, STEPS), E - 1)
        b_first = tl.load(p_start + b_e) + (o_i - tl.load(p_edge + b_e)) * run
        p_own = p_item + o_i * 3
        tl.store(p_own, b_e, mask=m_i)
        tl.store(p_own + 1, b_first, mask=m_i)
        tl.store(p_own + 2, tl.minimum(b_first + run, tl.load(p_start + b_e + 1)), mask=m_i)


def group(routes: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Pairs sorted by route head and block, `[X P]`, and the first pair of each block, `[X, E + 1]`, of `routes: [B, Hr, P / S, S]`.

    Pair `S query + slot` of route head x has the number `x P` more. Pairs without a block come last, in no block.
    """
    routes, heads, pairs = routes.contiguous(), routes.shape[0] * routes.shape[1], routes.shape[2] * routes.shape[3]
    count, tiles = heads * blocks, -(-pairs // _TILE)
    # a radix sort takes as many passes as there are bits
    ids = torch.empty(heads * pairs, dtype=torch.int16 if count < 1 << 15 else torch.int32, device=routes.device)
    number_kernel[(heads * tiles,)](routes, ids, pairs, blocks, count, tiles, BP=_TILE, num_warps=4)
    ordered, order = ids.sort(stable=True)
    start = torch.empty(heads, blocks + 1, dtype=torch.int32, device=routes.device)
    tile = min(256, power(start.numel()))
    start_kernel[(-(-start.numel() // tile),)](ordered, start, heads, blocks, len(ids), len(ids).bit_length(), BE=tile, num_warps=4)
    return order.to(torch.int32), start


def items(start: Tensor, run: int, most: int) -> tuple[Tensor, Tensor]:
    """Blocks cut into runs: `[X, most, 3]` (block, first pair, end), empty beyond the last; `[X, E + 1]` first run of each block."""
    heads, blocks = start.shape[0], start.shape[1] - 1
    table, edges = start.new_empty(heads, most, 3), torch.empty_like(start)
    tile = min(_TILE, max(32, power(max(blocks, most))))
    item_kernel[(heads,)](start, edges, table, blocks, most, run, blocks.bit_length(), BE=tile, num_warps=4)
    return table, edges
