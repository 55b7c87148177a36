"""The attention kernel: a tile of queries of one expert against the shared landmarks and the expert's keys, one softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from ._tile import LOG2E, expert_of, head_offset, load_rows, online_softmax, store_rows


@triton.jit
def attend_kernel(
    q, k, v, r, value, index, order, start, tile, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, TILES, scale, shared_scale,
    G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    T: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, MP: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`out` and the base-2 `lse` of T pairs; with S > 1 they are partial, one of S slots, and slot 0 alone reads landmarks."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_head = i_bh.to(tl.int64)
    i_e = 0
    if ROUTED:
        p_e = i_head * (M + 1)
        i_e = expert_of(tile + p_e, i_t, M, MP)
        if i_e >= M:
            return
        first = tl.load(start + p_e + i_e) + (i_t - tl.load(tile + p_e + i_e)) * T
        o_p = first + tl.arange(0, T)
        m_q = o_p < tl.load(start + p_e + i_e + 1)
        b_pair = tl.load(order + i_head * S * N + o_p, mask=m_q, other=0)
    else:
        b_pair = i_t * T + tl.arange(0, T)
        m_q = b_pair < N
    o_q = b_pair % N if S > 1 else b_pair
    # [T, BD]
    b_q = load_rows(q + head_offset(i_bh, H, 1, stride_qb, stride_qh), o_q, m_q, stride_qn, D, BD)
    b_max = tl.full([T], float("-inf"), tl.float32)
    b_sum = tl.zeros([T], tl.float32)
    b_acc = tl.zeros([T, BDV], tl.float32)
    if SHARED:
        for i in range(0, M, BM):
            o_m = i + tl.arange(0, BM)
            m_m = o_m < M
            b_r = load_rows(r + i_head * M * D, o_m, m_m, D, D, BD)
            b_s = tl.dot(b_q, tl.trans(b_r), input_precision=PREC) * (shared_scale * LOG2E)
            b_s = tl.where(m_m[None, :], b_s, float("-inf"))
            if S > 1:
                b_s = tl.where((b_pair < N)[:, None], b_s, float("-inf"))
            b_u = load_rows(value + i_head * M * DV, o_m, m_m, DV, DV, BDV)
            b_max, b_sum, b_acc = online_softmax(b_s, b_u, b_max, b_sum, b_acc, PREC)
    if ROUTED:
        p_k = k + head_offset(i_bh, H, G, stride_kb, stride_kh)
        p_v = v + head_offset(i_bh, H, G, stride_vb, stride_vh)
        for i in range(0, K, BK):
            o_k = i + tl.arange(0, BK)
            m_k = o_k < K
            b_j = tl.load(index + (i_head * M + i_e) * K + o_k, mask=m_k, other=0)
            b_k = load_rows(p_k, b_j, m_k, stride_kn, D, BD)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * (scale * LOG2E)
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
            b_v = load_rows(p_v, b_j, m_k, stride_vn, DV, BDV)
            b_max, b_sum, b_acc = online_softmax(b_s, b_v, b_max, b_sum, b_acc, PREC)
    p_out = i_head * S * N
    store_rows(out + p_out * DV, b_pair, m_q, DV, b_acc / b_sum[:, None], DV, BDV)
    tl.store(lse + p_out + b_pair, b_max + tl.log2(b_sum), mask=m_q)


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
