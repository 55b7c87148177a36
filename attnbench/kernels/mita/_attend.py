"""The attention kernel: queries of one expert against the shared landmarks and the expert's keys, in one softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, head_offset, load_rows, store_rows
from ._tile import attend_both, attend_to, segment_of


@triton.jit
def pairs_at(p_order, i, last, T: tl.constexpr, ROUTED: tl.constexpr):
    """Pairs `i .. i + T` of a segment that ends at `last`, and which of them there are."""
    b_pair = i + tl.arange(0, T)
    m_q = b_pair < last
    if ROUTED:
        b_pair = tl.load(p_order + b_pair, mask=m_q, other=0)
    return b_pair, m_q


@triton.jit
def attend_kernel(
    q, k, v, r, value, index, order, segment, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, SEGMENTS, MOST, scale, shared_scale,
    G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    LENGTH: tl.constexpr, RUN: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, AHEAD: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`out` and the base-2 `lse` of RUN segments, each of pairs of one expert, T at a time.

    Where landmarks and keys fit one tile each, landmarks are read once, keys once a segment. With S > 1 outputs are partial, one of S
    slots, and slot 0 alone reads landmarks. With AHEAD the pairs of a tile are asked for before the tile before it is done, those
    of the first before the keys.
    """
    RUNS = (SEGMENTS + RUN - 1) // RUN
    i_r, i_bh = tl.program_id(0) % RUNS, tl.program_id(0) // RUNS
    i_head = i_bh.to(tl.int64)
    if ROUTED:
        # empty segments come last
        _, first, last = segment_of(segment, i_head * MOST + i_r * RUN)
        if first >= last:
            return
    p_q = q + head_offset(i_bh, H, 1, stride_qb, stride_qh)
    p_k = k + head_offset(i_bh, H, G, stride_kb, stride_kh)
    p_v = v + head_offset(i_bh, H, G, stride_vb, stride_vh)
    p_r, p_u, p_order = r + i_head * M * D, value + i_head * M * DV, order + i_head * S * N
    o_m, o_k = tl.arange(0, BM), tl.arange(0, BK)
    m_m, m_k = o_m < M, o_k < K
    if SHARED and ROUTED and M <= BM and K <= BK:
        b_r, b_u = load_rows(p_r, o_m, m_m, D, D, BD), load_rows(p_u, o_m, m_m, DV, DV, BDV)
    for i_s in range(i_r * RUN, tl.minimum(SEGMENTS, (i_r + 1) * RUN)):
        i_e, first, last = 0, i_s * LENGTH, tl.minimum(N, (i_s + 1) * LENGTH)
        if ROUTED:
            i_e, first, last = segment_of(segment, i_head * MOST + i_s)
        p_j = index + (i_head * M + i_e) * K
        if AHEAD:
            b_next, m_next = pairs_at(p_order, first, last, T, ROUTED)
        if SHARED and ROUTED and M <= BM and K <= BK:
            # a segment without pairs reads no keys
            m_s = m_k & (first < last)
            b_j = tl.load(p_j + o_k, mask=m_s, other=0)
            b_k, b_v = load_rows(p_k, b_j, m_s, stride_kn, D, BD), load_rows(p_v, b_j, m_s, stride_vn, DV, BDV)
        for i in range(first, last, T):
            if AHEAD:
                b_pair, m_q = b_next, m_next
                b_next, m_next = pairs_at(p_order, i + T, last, T, ROUTED)
            else:
                b_pair, m_q = pairs_at(p_order, i, last, T, ROUTED)
            # [T, BD]
            b_q = load_rows(p_q, b_pair % N if S > 1 else b_pair, m_q, stride_qn, D, BD)
            if SHARED and ROUTED and M <= BM and K <= BK:
                b_max, b_sum, b_acc = attend_both(
                    b_q, b_r, b_u, m_m[None, :] & (b_pair < N)[:, None] if S > 1 else m_m[None, :], shared_scale * LOG2E,
                    b_k, b_v, m_k[None, :], scale * LOG2E, PREC,
                )  # fmt: skip
            else:
                b_max = tl.full([T], float("-inf"), tl.float32)
                b_sum = tl.zeros([T], tl.float32)
                b_acc = tl.zeros([T, BDV], tl.float32)
                if SHARED:
                    for i_m in range(0, M, BM):
                        m_t = i_m + o_m < M
                        b_r, b_u = load_rows(p_r, i_m + o_m, m_t, D, D, BD), load_rows(p_u, i_m + o_m, m_t, DV, DV, BDV)
                        m_t = m_t[None, :] & (b_pair < N)[:, None]
                        b_max, b_sum, b_acc = attend_to(b_q, b_r, b_u, m_t, shared_scale * LOG2E, b_max, b_sum, b_acc, PREC)
                if ROUTED:
                    for i_k in range(0, K, BK):
                        m_t = i_k + o_k < K
                        b_j = tl.load(p_j + i_k + o_k, mask=m_t, other=0)
                        b_k, b_v = load_rows(p_k, b_j, m_t, stride_kn, D, BD), load_rows(p_v, b_j, m_t, stride_vn, DV, BDV)
                        b_max, b_sum, b_acc = attend_to(b_q, b_k, b_v, m_t[None, :], scale * LOG2E, b_max, b_sum, b_acc, PREC)
            store_rows(out + i_head * S * N * DV, b_pair, m_q, DV, b_acc / b_sum[:, None], DV, BDV)
            tl.store(lse + i_head * S * N + b_pair, b_max + tl.log2(b_sum), mask=m_q)


@triton.jit
def merge_kernel(
    part, part_lse, out, lse, N, NB,
    S: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Merge the S partial outputs of every query by their log-sum-exp."""
    i_n, i_bh = tl.program_id(0) % NB, (tl.program_id(0) // NB).to(tl.int64)
    o_n = i_n * BT + tl.arange(0, BT)
    m_n = o_n < N
    p_lse = part_lse + i_bh * S * N + o_n
    b_max = tl.load(p_lse, mask=m_n, other=0.0)
    for i in tl.static_range(1, S):
        b_max = tl.maximum(b_max, tl.load(p_lse + i * N, mask=m_n, other=0.0))
    b_sum = tl.zeros([BT], tl.float32)
    b_acc = tl.zeros([BT, BDV], tl.float32)
    for i in tl.static_range(S):
        b_w = tl.exp2(tl.load(p_lse + i * N, mask=m_n, other=0.0) - b_max)
        b_sum += b_w
        b_acc += b_w[:, None] * load_rows(part + (i_bh * S + i) * N * DV, o_n, m_n, DV, DV, BDV)
    store_rows(out + i_bh * N * DV, o_n, m_n, DV, b_acc / b_sum[:, None], DV, BDV)
    tl.store(lse + i_bh * N + o_n, b_max + tl.log2(b_sum), mask=m_n)
