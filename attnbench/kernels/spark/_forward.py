"""Kernels of pairs, forward: statistics of the scores of causal queries, and attention to the keys that reach the threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows, store_rows
from ._tile import gate_of, query_tile, visible


@triton.jit
def spark_statistics_kernel(
    q, k, mean, squares, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, H, N, M, TILES,
    G: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the scores that a tile of causal queries sees."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    m_q = o_q < N
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_q, stride_qn, R, BR)
    p_k = k + i_b * stride_kb + i_h // G * stride_kh
    b_count = tl.zeros([BQ], tl.float32)
    b_mean = tl.zeros([BQ], tl.float32)
    b_squares = tl.zeros([BQ], tl.float32)
    for start in range(0, tl.minimum(M, (i_t + 1) * BQ), BN):
        o_n = start + tl.arange(0, BN)
        b_k = load_rows(p_k, o_n, o_n < M, stride_kn, R, BR)
        # [BQ, BN]
        b_u = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)
        m_s = visible(o_q, o_n, M, True)
        b_n = tl.sum(m_s.to(tl.float32), 1)
        b_own = tl.sum(tl.where(m_s, b_u, 0.0), 1) / tl.maximum(b_n, 1.0)
        b_apart = tl.where(m_s, b_u - b_own[:, None], 0.0)
        b_total = tl.maximum(b_count + b_n, 1.0)
        b_step = b_own - b_mean
        b_squares += tl.sum(b_apart * b_apart, 1) + b_step * b_step * (b_count * b_n / b_total)
        b_mean += b_step * (b_n / b_total)
        b_count += b_n
    tl.store(mean + i_bh.to(tl.int64) * N + o_q, b_mean, mask=m_q)
    tl.store(squares + i_bh.to(tl.int64) * N + o_q, b_squares, mask=m_q)


@triton.jit
def spark_attend_kernel(
    q, k, v, limit, flags, out, lse, used,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head. R dimensions predict, S gate; `lse` is base 2; `used` is the threshold as lowered.

    With SOME only tiles of 64 queries whose flag is not 0, here and in the other kernels.
    """
    i_t, wanted, o_q, m_q, o_row, p_q, p_k, p_v = query_tile(
        q, k, v, flags, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES, G, BQ, SOME
    )
    if wanted == 0:
        return
    # [BQ, BR], [BQ, BS]
    b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
    b_limit = tl.load(limit + o_row, mask=m_q, other=0.0)
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_acc = tl.zeros([BQ, BDV], tl.float32)
    last = M
    if CAUSAL:
        last = tl.minimum(M, (i_t + 1) * BQ)
    for start in range(0, last, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < M
        b_kr = load_rows(p_k, o_n, m_n, stride_kn, R, BR)
        # [BQ, BN]
        b_u = tl.where(visible(o_q, o_n, M, CAUSAL), tl.dot(b_qr, tl.trans(b_kr), input_precision=PREC), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_u, 1))
        b_least = tl.minimum(b_limit, b_new)
        b_p = tl.where((b_u >= b_least[:, None]) & (b_u > float("-inf")), tl.exp2((b_u - b_new[:, None]) * (scale * LOG2E)), 0.0)
        # where nothing reached the threshold before, what counted was the largest then
        b_decay = tl.where((b_max < b_limit) & (b_new > b_max), 0.0, tl.exp2((b_max - b_new) * (scale * LOG2E)))
        b_ks = load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
        b_gate, _ = gate_of(tl.dot(b_qs, tl.trans(b_ks), input_precision=PREC) * scale_s)
        b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None] + tl.dot((b_p * b_gate).to(b_v.dtype), b_v, input_precision=PREC)
        b_max = b_new
    store_rows(out, o_row, m_q, DV, b_acc / b_sum[:, None], DV, BDV)
    tl.store(lse + o_row, b_max * (scale * LOG2E) + tl.log2(b_sum), mask=m_q)
    tl.store(used + o_row, tl.minimum(b_limit, b_max), mask=m_q)
