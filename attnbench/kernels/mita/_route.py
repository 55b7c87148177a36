"""Kernels that route: the gate's argmax with ranks and counts a block, and a stable counting sort of the queries by expert."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import head_offset, load_rows


@triton.jit
def gate_kernel(
    q, r, expert, rank, count, stride_b, stride_h, stride_n, H, N, NB,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BQ: tl.constexpr, MP: tl.constexpr,
    BD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The S landmarks nearest each of ROWS queries (by q . r, ties to the first).

    Beside them each pair's rank among the block's pairs of its expert, and how many there are of each expert.
    """
    i_n, i_bh = tl.program_id(0) % NB, tl.program_id(0) // NB
    o_m, o_i = tl.arange(0, MP), tl.arange(0, BQ)
    # [MP, BD]
    b_r = load_rows(r + i_bh.to(tl.int64) * M * D, o_m, o_m < M, D, D, BD)
    p_q = q + head_offset(i_bh, H, 1, stride_b, stride_h)
    b_count = tl.zeros([MP], tl.int32)
    for first in range(0, ROWS, BQ):
        o_q = i_n * ROWS + first + o_i
        m_q = o_q < N
        b_q = load_rows(p_q, o_q, m_q, stride_n, D, BD)
        # [BQ, MP]
        b_g = tl.dot(b_q, tl.trans(b_r), input_precision=PREC)
        b_g = tl.where((o_m < M)[None, :], b_g, float("-inf"))
        for i_s in tl.static_range(S):
            b_first = tl.where(b_g == tl.max(b_g, 1)[:, None], o_m[None, :], MP)
            b_e = tl.minimum(tl.min(b_first, 1), M - 1)
            b_hot = b_e[:, None] == o_m[None, :]
            # [BQ, BQ]: earlier pairs of the same expert
            b_same = (b_e[:, None] == b_e[None, :]) & (o_i[None, :] < o_i[:, None])
            b_rank = tl.sum(b_same.to(tl.int32), 1) + tl.sum(tl.where(b_hot, b_count[None, :], 0), 1)
            b_count += tl.sum((b_hot & m_q[:, None]).to(tl.int32), 0)
            o_pair = (i_bh * S + i_s).to(tl.int64) * N + o_q
            tl.store(expert + o_pair, b_e.to(tl.uint8), mask=m_q)
            tl.store(rank + o_pair, b_rank.to(tl.int16), mask=m_q)
            if S > 1:
                b_g = tl.where(b_hot, float("-inf"), b_g)
    tl.store(count + tl.program_id(0).to(tl.int64) * M + o_m, b_count, mask=o_m < M)


@triton.jit
def permute_kernel(
    expert, rank, count, place, order, start, segment, N, NB, MOST,
    M: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, BB: tl.constexpr, MP: tl.constexpr, LENGTH: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """Write `order`, the pairs slot * N + query grouped by expert, the first pair of each expert, and the table of segments.

    Each expert's pairs are cut into segments of LENGTH; a row of the table is (expert, first pair, last pair + 1, 0). A program
    writes TB of its MOST rows.
    """
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
        p_m = start + i_bh * (M + 1) + o_m
        tl.store(p_m, b_end - b_total, mask=m_m)
        tl.store(p_m + 1, b_end, mask=o_m == M - 1)
    b_segments = (b_total + LENGTH - 1) // LENGTH
    b_last = tl.cumsum(b_segments, 0)
    o_t = i_n * TB + tl.arange(0, TB)
    # [TB, MP]
    b_mine = tl.sum((b_last[None, :] <= o_t[:, None]).to(tl.int32), 1)[:, None] == o_m[None, :]
    b_from = b_end - b_total + (o_t[:, None] - (b_last - b_segments)[None, :]) * LENGTH
    b_from = tl.sum(tl.where(b_mine, b_from, 0), 1)
    p_t = segment + (i_bh * MOST + o_t) * 4
    tl.store(p_t, tl.sum(tl.where(b_mine, o_m[None, :], 0), 1), mask=o_t < MOST)
    tl.store(p_t + 1, b_from, mask=o_t < MOST)
    tl.store(p_t + 2, tl.minimum(b_from + LENGTH, tl.sum(tl.where(b_mine, b_end[None, :], 0), 1)), mask=o_t < MOST)
    tl.store(p_t + 3, tl.zeros([TB], tl.int32), mask=o_t < MOST)
    # a query's place is looked up by its expert
    p_place = place + tl.program_id(0).to(tl.int64) * M
    tl.store(p_place + o_m, b_place, mask=m_m)
    tl.debug_barrier()
    o_q = i_n * ROWS + tl.arange(0, ROWS)
    m_q = o_q < N
    for i_s in tl.static_range(S):
        o_pair = (i_bh * S + i_s) * N + o_q
        b_e = tl.load(expert + o_pair, mask=m_q, other=0).to(tl.int32)
        b_to = tl.load(p_place + b_e, mask=m_q, other=0) + tl.load(rank + o_pair, mask=m_q, other=0).to(tl.int32)
        tl.store(order + i_bh * S * N + b_to, i_s * N + o_q, mask=m_q)
