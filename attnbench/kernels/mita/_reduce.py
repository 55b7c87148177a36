"""Kernels of the backward pass that only add: partial sums, experts' keys into dk and dv, pooling into dq.

Every sum has a fixed order; the one atomic sets bits, whose order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import load_rows, store_rows
from ._tile import averaged


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
def sum_probe_kernel(
    part, dr, share, PARTS, GH, GW, PH, PW,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Add the landmark pass's share to dr; POOLED writes the share of each token that a landmark averages."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    p_r = dr + i_row * D + o_d
    b_r = tl.load(p_r, mask=o_d < D, other=0.0) + sum_parts(part, i_row, PARTS, M, D, BD, BP)
    tl.store(p_r, b_r, mask=o_d < D)
    if POOLED:
        i_y, i_x = (tl.program_id(0) % M) // PW, (tl.program_id(0) % M) % PW
        height = ((i_y + 1) * GH + PH - 1) // PH - i_y * GH // PH
        width = ((i_x + 1) * GW + PW - 1) // PW - i_x * GW // PW
        tl.store(share + i_row * D + o_d, (b_r / (height * width)).to(share.dtype.element_ty), mask=o_d < D)


@triton.jit
def bins_kernel(bins, N, prefix, GH, GW, PH, PW, M: tl.constexpr, BT: tl.constexpr):
    """`bins [N, WORDS]`: bit m of a token's words is set where landmark m averages the token, in bins as torch's adaptive pooling."""
    WORDS: tl.constexpr = (M + 31) // 32
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_t = o_n - prefix
    b_y, b_x = (o_t // GW)[:, None], (o_t % GW)[:, None]
    m_t = ((o_t >= 0) & (o_t < GH * GW))[:, None]
    o_bit = tl.arange(0, 32)
    for i in tl.static_range(WORDS):
        o_m = (i * 32 + o_bit)[None, :]
        m_y, m_x = o_m // PW, o_m % PW
        m_in = (b_y >= m_y * GH // PH) & (b_y < ((m_y + 1) * GH + PH - 1) // PH)
        m_in = m_in & (b_x >= m_x * GW // PW) & (b_x < ((m_x + 1) * GW + PW - 1) // PW)
        b_word = tl.sum(tl.where(m_in & m_t & (o_m < M), 1 << o_bit[None, :], 0), 1)
        tl.store(bins + o_n * WORDS + i, b_word, mask=o_n < N)


@triton.jit
def mark_kernel(
    index, start, mask, segment, N,
    LENGTH: tl.constexpr, LISTS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Set a list's bit in the `mask [Hkv, N, WORDS]` of each key that it selects, and write the first segment of its expert."""
    i_l, i_kv = tl.program_id(0) % LISTS, (tl.program_id(0) // LISTS).to(tl.int64)
    o_k = tl.arange(0, KP)
    b_key = tl.load(index + (i_kv * LISTS + i_l) * K + o_k, mask=o_k < K, other=0)
    b_bit = tl.full([KP], 1, tl.int32) << (i_l % 32)
    tl.atomic_or(mask + (i_kv * N + b_key) * WORDS + i_l // 32, b_bit, mask=o_k < K, sem="relaxed")
    # the list's own query head, and the segments of its earlier experts
    i_m, o_m = i_l % M, tl.arange(0, MP)
    i_head = i_kv * (LISTS // M) + i_l // M
    p_e = start + i_head * (M + 1) + o_m
    b_count = tl.load(p_e + 1, mask=o_m < M, other=0) - tl.load(p_e, mask=o_m < M, other=0)
    b_segments = (b_count + LENGTH - 1) // LENGTH
    p_s = segment + i_head * (M + 1)
    tl.store(p_s + i_m, tl.sum(tl.where(o_m < i_m, b_segments, 0), 0))
    tl.store(p_s + M, tl.sum(b_segments, 0), mask=i_m == M - 1)


@triton.jit
def link_kernel(
    index, mask, link, N, LISTS: tl.constexpr, WORDS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """For each selection of a list: 2 (the next list's selection of the same key + 1) + whether no earlier list selects it."""
    i_l, i_kv = tl.program_id(0) % LISTS, (tl.program_id(0) // LISTS).to(tl.int64)
    o_k = tl.arange(0, KP)
    m_k = o_k < K
    b_key = tl.load(index + (i_kv * LISTS + i_l) * K + o_k, mask=m_k, other=0)
    b_next = tl.full([KP], LISTS, tl.int32)
    b_own = tl.full([KP], 1, tl.int32)
    b_one = tl.full([KP], 1, tl.int32)
    for i_w in range(WORDS):
        b_word = tl.load(mask + (i_kv * N + b_key) * WORDS + i_w, mask=m_k, other=0)
        # bits of earlier lists, and of later ones
        b_bit = tl.where(i_w == i_l // 32, b_one << (i_l % 32), 0)
        b_early = tl.where(i_w < i_l // 32, -1, tl.where(i_w == i_l // 32, b_bit - 1, 0))
        b_own = tl.where((b_word & b_early) != 0, 0, b_own)
        b_late = b_word & ~(b_early | b_bit)
        b_low = (b_late & -b_late).to(tl.float32)
        b_at = i_w * 32 + (tl.log2(tl.maximum(tl.abs(b_low), 1.0)) + 0.5).to(tl.int32)
        b_next = tl.minimum(b_next, tl.where(b_late != 0, b_at, LISTS))
    # the place of the key in that list, which ascends
    m_next = m_k & (b_next < LISTS)
    b_n = tl.zeros([KP], tl.int32)
    step = KP
    while step > 0:
        b_try = b_n + step
        m_try = m_next & (b_try <= K)
        b_there = tl.load(index + (i_kv * LISTS + b_next) * K + b_try - 1, mask=m_try, other=2147483647)
        b_n = tl.where(m_try & (b_there < b_key), b_try, b_n)
        step = step // 2
    b_link = tl.where(m_next, b_next * K + b_n + 1, 0) * 2 + b_own
    tl.store(link + (i_kv * LISTS + i_l) * K + o_k, b_link, mask=m_k)


@triton.jit
def scatter_kernel(
    part, part_v, index, link, segment, dk, dv, N, BLOCKS, SEGMENTS,
    M: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Add the experts' gradients to dk and dv: a key's first selection sums over all its selections, list by list."""
    i_b, i_kv = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    p_link = link + i_kv * PAIRS
    o_p = i_b * BP + tl.arange(0, BP)
    m_p = o_p < PAIRS
    b_key = tl.load(index + i_kv * PAIRS + o_p, mask=m_p, other=0)
    b_link = tl.load(p_link + o_p, mask=m_p, other=0)
    m_own = m_p & ((b_link & 1) == 1)
    b_dk = tl.zeros([BP, BD], tl.float32)
    b_dv = tl.zeros([BP, BDV], tl.float32)
    m_run, b_pair = m_own, o_p
    n_run = tl.sum(m_run.to(tl.int32), 0)
    while n_run > 0:
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
        b_pair = (b_link >> 1) - 1
        m_run = m_run & (b_pair >= 0)
        b_link = tl.load(p_link + b_pair, mask=m_run, other=0)
        n_run = tl.sum(m_run.to(tl.int32), 0)
    p_dk, p_dv = dk + i_kv * N * D, dv + i_kv * N * DV
    b_dk += load_rows(p_dk, b_key, m_own, D, D, BD).to(tl.float32)
    b_dv += load_rows(p_dv, b_key, m_own, DV, DV, BDV).to(tl.float32)
    store_rows(p_dk, b_key, m_own, D, b_dk, D, BD)
    store_rows(p_dv, b_key, m_own, DV, b_dv, DV, BDV)


@triton.jit
def finish_kernel(
    dq, share, bins, out, N, BLOCKS,
    S: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, POOLED: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """`out = sum over slots of dq + what landmarks pass on to the tokens that they average`."""
    i_b, i_bh = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_n = i_b * BT + tl.arange(0, BT)
    m_n = o_n < N
    b_dq = load_rows(dq + i_bh * S * N * D, o_n, m_n, D, D, BD).to(tl.float32)
    for i in tl.static_range(1, S):
        b_dq += load_rows(dq + (i_bh * S + i) * N * D, o_n, m_n, D, D, BD).to(tl.float32)
    if POOLED:
        for i_m in range(0, M, BM):
            o_m = i_m + tl.arange(0, BM)
            b_share = load_rows(share + i_bh * M * D, o_m, o_m < M, D, D, BD)
            b_dq += tl.dot(averaged(bins, o_n, m_n, i_m, M, BM).to(b_share.dtype), b_share, input_precision=PREC)
    store_rows(out + i_bh * N * D, o_n, m_n, D, b_dq, D, BD)
