"""The choice of blocks: queries against one row a block, such as its mean key, the largest scores kept, no scores in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._define import define, on_device, power, unit_rows
from .._tile import load_rows

LEAST = tl.constexpr(-3e38)
"""a score that is NaN or -inf counts as this: above those of blocks that may not be chosen"""


@triton.jit
def block_route_kernel(
    q, means, routes, stride_qb, stride_qh, stride_qn, H, N, E, TILES,
    G: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BE: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The S best blocks of T queries, in no order, -1 where there are fewer. A tile of scores is searched while it beats what is kept."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n = i_t * T + tl.arange(0, T)
    m_n = o_n < N
    own = o_n // BLOCK
    # [T, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD).to(tl.float32)
    p_mean = means + (i_b * (H // G) + i_h // G) * E * D
    o_s = tl.arange(0, SP)
    # [T, SP], +inf where there is no slot, which nothing beats
    b_best = tl.zeros([T, SP], tl.float32) + tl.where(o_s < S, float("-inf"), float("inf"))[None, :]
    b_block = tl.full([T, SP], -1, tl.int32)
    blocks = E
    if CAUSAL:
        blocks = tl.minimum(E, (i_t * T + T - 1) // BLOCK + 1)
    for i in range(0, blocks, BE):
        o_e = i + tl.arange(0, BE)
        # [BE, BD], [T, BE]
        b_mean = load_rows(p_mean, o_e, o_e < E, D, D, BD)
        b_s = tl.dot(b_q, tl.trans(b_mean), input_precision="tf32x3")
        m_s = (o_e < E)[None, :] & m_n[:, None]
        if CAUSAL:
            m_s = m_s & (o_e[None, :] <= own[:, None])
            b_s = tl.where(o_e[None, :] == own[:, None], float("inf"), b_s)
        b_s = tl.where(b_s > LEAST, b_s, LEAST)
        b_s = tl.where(m_s, b_s, float("-inf"))
        for _ in range(S):
            b_top, b_least = tl.max(b_s, 1), tl.min(b_best, 1)
            if tl.max((b_top > b_least).to(tl.int32), 0) > 0:
                b_at, b_slot = tl.argmax(b_s, 1), tl.argmin(b_best, 1)
                m_put = (b_top > b_least)[:, None] & (o_s[None, :] == b_slot[:, None])
                b_best = tl.where(m_put, b_top[:, None], b_best)
                b_block = tl.where(m_put, (i + b_at)[:, None], b_block)
                b_s = tl.where(tl.arange(0, BE)[None, :] == b_at[:, None], float("-inf"), b_s)
    p_route = routes + (i_bh.to(tl.int64) * N + o_n)[:, None] * S + o_s[None, :]
    tl.store(p_route, b_block, mask=m_n[:, None] & (o_s < S)[None, :])


@define("route_blocks")
def route_blocks(q: Tensor, means: Tensor, topk: int, block: int, causal: bool) -> Tensor:
    """Blocks `[B, H, N, min(topk, E)]` int32 whose `means: [B, Hkv, E, D]` (float32) have the largest products with `q: [B, H, N, D]`.

    In no order; -1 where there are fewer. Products are accurate to about 2^-21; ties go to the earlier block, NaN is the smallest. Causal:
    the query's own block, of `block` tokens, is always chosen and later ones never are.
    """
    q, means, (b, h, n, d), blocks = unit_rows(q), means.contiguous(), q.shape, means.shape[2]
    slots, dim = min(topk, blocks), max(16, power(d))
    routes = torch.empty(b, h, n, slots, dtype=torch.int32, device=q.device)
    tile = 64 if dim <= 64 else 32
    tiles = -(-n // tile)
    with on_device(q):
        block_route_kernel[(b * h * tiles,)](
            q, means, routes, *q.stride()[:3], h, n, blocks, tiles, G=h // means.shape[1], S=slots, SP=power(slots), BLOCK=block, D=d,
            T=tile, BE=min(64, max(16, power(blocks))), BD=dim, CAUSAL=causal, num_warps=4, num_stages=2,
        )  # fmt: skip
    return routes


@torch.library.register_fake(route_blocks)
def _(q: Tensor, means: Tensor, topk: int, block: int, causal: bool) -> Tensor:
    return q.new_empty(*q.shape[:3], min(topk, means.shape[2]), dtype=torch.int32)
