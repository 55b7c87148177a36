"""Kernels that route: the gate's argmax with counts a block, and a stable counting sort of the queries by expert."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tile import head_offset, load_rows


@triton.jit
def gate_kernel(
    q, r, expert, count, stride_b, stride_h, stride_n, H, N, NB,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, MP: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The S landmarks nearest each of ROWS queries (by q . r, ties to the first), and how often each was chosen."""
    i_n, i_bh = tl.program_id(0) % NB, tl.program_id(0) // NB
    o_m = tl.arange(0, MP)
    # [MP, BD]
    b_r = load_rows(r + i_bh.to(tl.int64) * M * D, o_m, o_m < M, D, D, BD)
    p_q = q + head_offset(i_bh, H, 1, stride_b, stride_h)
    b_count = tl.zeros([MP], tl.int32)
    for start in range(0, ROWS, BQ):
        o_q = i_n * ROWS + start + tl.arange(0, BQ)
        m_q = o_q < N
        b_q = load_rows(p_q, o_q, m_q, stride_n, D, BD)
        # [BQ, MP]
        b_g = tl.dot(b_q, tl.trans(b_r), input_precision=PREC)
        b_g = tl.where((o_m < M)[None, :], b_g, float("-inf"))
        for i_s in tl.static_range(S):
            b_first = tl.where(b_g == tl.max(b_g, 1)[:, None], o_m[None, :], MP)
            b_e = tl.minimum(tl.min(b_first, 1), M - 1)
            b_hot = b_e[:, None] == o_m[None, :]
            b_count += tl.sum((b_hot & m_q[:, None]).to(tl.int32), 0)
            tl.store(expert + (i_bh * S + i_s).to(tl.int64) * N + o_q, b_e.to(tl.uint8), mask=m_q)
            if S > 1:
                b_g = tl.where(b_hot, float("-inf"), b_g)
    tl.store(count + tl.program_id(0).to(tl.int64) * M + o_m, b_count, mask=o_m < M)


@triton.jit
def permute_kernel(
    expert, count, order, start, tile, N, NB,
    M: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, BB: tl.constexpr, MP: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Write `order`, the pairs slot * N + query grouped by expert, with the first pair and first tile of T of each expert."""
    i_n, i_bh = tl.program_id(0) % NB, (tl.program_id(0) // NB).to(tl.int64)
    o_m = tl.arange(0, MP)
    m_m = o_m < M
    b_total = tl.zeros([MP], tl.int32)
    b_place = tl.zeros([MP], tl.int32)
    for first in range(0, NB, BB):
        o_b = first + tl.arange(0, BB)
        # [BB, MP]
        b_c = tl.load(count + (i_bh * NB + o_b)[:, None] * M + o_m[None, :], mask=(o_b < NB)[:, None] & m_m[None, :], other=0)
        b_total += tl.sum(b_c, 0)
        b_place += tl.sum(tl.where((o_b < i_n)[:, None], b_c, 0), 0)
    b_end = tl.cumsum(b_total, 0)
    b_place += b_end - b_total
    if i_n == 0:
        b_tile = tl.cumsum((b_total + T - 1) // T, 0)
        p_m = i_bh * (M + 1) + o_m
        tl.store(start + p_m, b_end - b_total, mask=m_m)
        tl.store(tile + p_m, b_tile - (b_total + T - 1) // T, mask=m_m)
        tl.store(start + p_m + 1, b_end, mask=o_m == M - 1)
        tl.store(tile + p_m + 1, b_tile, mask=o_m == M - 1)
    o_i = tl.arange(0, BQ)
    for i in range(0, ROWS // BQ):
        o_q = i_n * ROWS + i * BQ + o_i
        m_q = o_q < N
        for i_s in tl.static_range(S):
            p_e = expert + (i_bh * S + i_s) * N + o_q
            b_e = tl.load(p_e, mask=m_q, other=0).to(tl.int32)
            # [BQ, BQ]: earlier pairs of the same expert
            b_same = (b_e[:, None] == b_e[None, :]) & (o_i[None, :] < o_i[:, None])
            b_rank = tl.sum(b_same.to(tl.int32), 1)
            # [BQ, MP]
            b_hot = (b_e[:, None] == o_m[None, :]) & m_q[:, None]
            b_to = tl.sum(tl.where(b_hot, b_place[None, :], 0), 1) + b_rank
            tl.store(order + i_bh * S * N + b_to, i_s * N + o_q, mask=m_q)
            b_place += tl.sum(b_hot.to(tl.int32), 0)
