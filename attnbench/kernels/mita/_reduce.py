"""Kernels of the backward pass that only add: partial sums, experts' keys into dk and dv, pooling into dq. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tile import load_rows, store_rows


@triton.jit
def sum_parts(part, i_row, PARTS, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr):
    """Sum over PARTS of rows `[heads, PARTS, M, D]` for row `i_row` of `[heads, M]`: `[BD]`."""
    b_sum = tl.zeros([BP, BD], tl.float32)
    for first in range(0, PARTS, BP):
        o_p = first + tl.arange(0, BP)
        b_sum += load_rows(part, (i_row // M * PARTS + o_p) * M + i_row % M, o_p < PARTS, D, D, BD)
    return tl.sum(b_sum, 0)


@triton.jit
def sum_landmark_kernel(
    part_r, part_u, value, stat, u, u_delta, dr, PARTS,
    M: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """`u`, the gradient of a landmark's value over its softmax sum; `u . value`; and dr so far."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    tl.store(dr + i_row * D + o_d, sum_parts(part_r, i_row, PARTS, M, D, BD, BP), mask=o_d < D)
    b_u = sum_parts(part_u, i_row, PARTS, M, DV, BDV, BP) / tl.load(stat + i_row * 2 + 1)
    b_value = tl.load(value + i_row * DV + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
    tl.store(u + i_row * DV + o_v, b_u.to(u.dtype.element_ty), mask=o_v < DV)
    tl.store(u_delta + i_row, tl.sum(b_u * b_value, 0))


@triton.jit
def sum_probe_kernel(part, dr, PARTS, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr):
    """Add the landmark pass's share to dr."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_r = dr + i_row * D + o_d
    tl.store(p_r, tl.load(p_r, mask=o_d < D, other=0.0) + sum_parts(part, i_row, PARTS, M, D, BD, BP), mask=o_d < D)


@triton.jit
def rank_kernel(
    index, start, key, pair, segment,
    SEGMENT: tl.constexpr, LISTS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BL: tl.constexpr,
    MP: tl.constexpr,
):  # fmt: skip
    """Sort the LISTS * K selections of a key head by key, ties by list, and write each expert's first segment.

    One program a list: the rank of a selection is the number of smaller ones, found by binary search in every ascending list.
    """
    i_l, i_kv = tl.program_id(0) % LISTS, (tl.program_id(0) // LISTS).to(tl.int64)
    p_list = index + i_kv * LISTS * K
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_key = tl.load(p_list + i_l * K + o_k, mask=m_k, other=0)
    b_rank = tl.zeros([KP], tl.int32)
    for first in range(0, LISTS, BL):
        # [BL, 1]
        o_l = (first + tl.arange(0, BL))[:, None]
        b_x = b_key[None, :] + (o_l < i_l).to(tl.int32)
        b_n = tl.zeros([BL, KP], tl.int32)
        step = KP
        while step > 0:
            b_try = b_n + step
            m_try = (b_try <= K) & (o_l < LISTS)
            b_at = tl.load(p_list + o_l * K + b_try - 1, mask=m_try, other=2147483647)
            b_n = tl.where(m_try & (b_at < b_x), b_try, b_n)
            step = step // 2
        b_rank += tl.sum(b_n, 0)
    tl.store(key + i_kv * LISTS * K + b_rank, b_key, mask=m_k)
    tl.store(pair + i_kv * LISTS * K + b_rank, i_l * K + o_k, mask=m_k)
    # first segments, by the list's own query head
    i_m = i_l % M
    p_e = (i_kv * (LISTS // M) + i_l // M) * (M + 1)
    o_m = tl.arange(0, MP)
    b_count = tl.load(start + p_e + o_m + 1, mask=o_m < M, other=0) - tl.load(start + p_e + o_m, mask=o_m < M, other=0)
    b_segments = (b_count + SEGMENT - 1) // SEGMENT
    tl.store(segment + p_e + i_m, tl.sum(tl.where(o_m < i_m, b_segments, 0), 0))
    tl.store(segment + p_e + M, tl.sum(b_segments, 0), mask=i_m == M - 1)


@triton.jit
def scatter_kernel(
    part, part_v, key, pair, segment, dk, dv, N, BLOCKS, SEGMENTS,
    M: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Add the experts' gradients to dk and dv: the first of a run of selections of one key sums the run and owns the key."""
    i_b, i_kv = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    p_key, p_pair = key + i_kv * PAIRS, pair + i_kv * PAIRS
    o_p = i_b * BP + tl.arange(0, BP)
    m_p = o_p < PAIRS
    b_key = tl.load(p_key + o_p, mask=m_p, other=-1)
    b_before = tl.load(p_key + o_p - 1, mask=m_p & (o_p > 0), other=-1)
    m_own = m_p & (b_key != b_before)
    b_dk = tl.zeros([BP, BD], tl.float32)
    b_dv = tl.zeros([BP, BDV], tl.float32)
    m_run = m_own
    n_run = tl.sum(m_run.to(tl.int32), 0)
    o_at = o_p
    while n_run > 0:
        b_pair = tl.load(p_pair + o_at, mask=m_run, other=0)
        i_list = b_pair // K
        i_head = i_kv * G + i_list // M
        p_e = segment + i_head * (M + 1) + i_list % M
        b_first = tl.load(p_e, mask=m_run, other=0)
        b_count = tl.load(p_e + 1, mask=m_run, other=0) - b_first
        n_segments = tl.max(b_count, 0)
        for i in range(0, n_segments):
            m_s = m_run & (i < b_count)
            o_part = (i_head * SEGMENTS + b_first + i) * K + b_pair % K
            b_dk += load_rows(part, o_part, m_s, D, D, BD)
            b_dv += load_rows(part_v, o_part, m_s, DV, DV, BDV)
        o_at += 1
        m_run = m_run & (o_at < PAIRS)
        m_run = m_run & (tl.load(p_key + o_at, mask=m_run, other=-1) == b_key)
        n_run = tl.sum(m_run.to(tl.int32), 0)
    p_dk, p_dv = dk + i_kv * N * D, dv + i_kv * N * DV
    b_dk += load_rows(p_dk, b_key, m_own, D, D, BD).to(tl.float32)
    b_dv += load_rows(p_dv, b_key, m_own, DV, DV, BDV).to(tl.float32)
    store_rows(p_dk, b_key, m_own, D, b_dk, D, BD)
    store_rows(p_dv, b_key, m_own, DV, b_dv, DV, BDV)


@triton.jit
def finish_kernel(
    dq, dr, out, N, BLOCKS, prefix, GH, GW, PH, PW,
    S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """`out = sum over slots of dq + sum over the bins of a token of dr / bin size`; out may be dq itself."""
    i_b, i_bh = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_n = i_b * BT + tl.arange(0, BT)
    m_n = o_n < N
    b_dq = load_rows(dq + i_bh * S * N * D, o_n, m_n, D, D, BD).to(tl.float32)
    for i in tl.static_range(1, S):
        b_dq += load_rows(dq + (i_bh * S + i) * N * D, o_n, m_n, D, D, BD).to(tl.float32)
    if POOLED:
        o_t = o_n - prefix
        m_t = m_n & (o_t >= 0) & (o_t < GH * GW)
        o_t = tl.where(m_t, o_t, 0)
        b_y, b_x = o_t // GW, o_t % GW
        # bins first .. last - 1 of each axis hold the token
        b_y0, b_y1 = b_y * PH // GH, ((b_y + 1) * PH + GH - 1) // GH
        b_x0, b_x1 = b_x * PW // GW, ((b_x + 1) * PW + GW - 1) // GW
        n_y, n_x = tl.max(b_y1 - b_y0, 0), tl.max(b_x1 - b_x0, 0)
        for i in range(0, n_y * n_x):
            i_y, i_x = b_y0 + i // n_x, b_x0 + i % n_x
            m_i = m_t & (i_y < b_y1) & (i_x < b_x1)
            b_h = ((i_y + 1) * GH + PH - 1) // PH - i_y * GH // PH
            b_w = ((i_x + 1) * GW + PW - 1) // PW - i_x * GW // PW
            b_r = load_rows(dr + i_bh * PH * PW * D, i_y * PW + i_x, m_i, D, D, BD)
            b_dq += tl.where(m_i[:, None], b_r / (b_h * b_w).to(tl.float32)[:, None], 0.0)
    store_rows(out + i_bh * N * D, o_n, m_n, D, b_dq, D, BD)
