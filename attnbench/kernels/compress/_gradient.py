"""Kernels of gradients: of a tile of queries, and of a tile of compressed keys over one split of the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows, store_rows
from ..blocks._tile import score_gradient
from ._tile import stairs, visible


@triton.jit
def compressed_query_gradient_kernel(
    grad, q, k, v, lse, delta, dq,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of T queries."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h, i_row = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64) * N
    o_n = i_t * T + tl.arange(0, T)
    m_n = o_n < N
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    # [T, BD], [T, BDV]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD)
    b_g = load_rows(grad + i_b * stride_gb + i_h * stride_gh, o_n, m_n, stride_gn, DV, BDV)
    b_lse = tl.load(lse + i_row + o_n, mask=m_n, other=float("inf"))
    b_delta = tl.load(delta + i_row + o_n, mask=m_n, other=0.0)
    b_dq = tl.zeros([T, BD], tl.float32)
    for i in range(0, visible(tl.minimum(N, i_t * T + T) - 1, C, STRIDE, LENGTH, CAUSAL), BK):
        o_c = i + tl.arange(0, BK)
        b_k, b_v = load_rows(p_k, o_c, o_c < C, stride_kn, D, BD), load_rows(p_v, o_c, o_c < C, stride_vn, DV, BDV)
        m_s = stairs(o_n, o_c, C, STRIDE, LENGTH, CAUSAL)
        b_ds = score_gradient(b_q, b_k, b_g, b_v, m_s, scale * LOG2E, b_lse, b_delta, PREC)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC)
    store_rows(dq + i_row * D, o_n, m_n, D, b_dq * scale, D, BD)


@triton.jit
def compressed_key_gradient_kernel(
    grad, q, k, v, lse, delta, part_k, part_v,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, SPLITS, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BK compressed keys and values over one split of the queries of their group of heads."""
    i_j, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_s, i_kv = i_rest % SPLITS, (i_rest // SPLITS).to(tl.int64)
    HK = H // G
    i_b, i_hk = i_kv // HK, i_kv % HK
    o_c = i_j * BK + tl.arange(0, BK)
    # [BK, BD], [BK, BDV]
    b_k = load_rows(k + i_b * stride_kb + i_hk * stride_kh, o_c, o_c < C, stride_kn, D, BD)
    b_v = load_rows(v + i_b * stride_vb + i_hk * stride_vh, o_c, o_c < C, stride_vn, DV, BDV)
    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BDV], tl.float32)
    tiles = (N + T - 1) // T
    begin = 0
    if CAUSAL:  # the first query that reads any of these keys
        begin = tl.minimum(tiles, (i_j * BK * STRIDE + LENGTH - 1) // T)
    tiles -= begin
    for i_g in range(G):
        i_h = i_hk * G + i_g
        p_q, p_g = q + i_b * stride_qb + i_h * stride_qh, grad + i_b * stride_gb + i_h * stride_gh
        i_row = (i_b * H + i_h) * N
        for i in range(begin + i_s * tiles // SPLITS, begin + (i_s + 1) * tiles // SPLITS):
            o_n = i * T + tl.arange(0, T)
            m_n = o_n < N
            # [T, BD], [T, BDV]
            b_q, b_g = load_rows(p_q, o_n, m_n, stride_qn, D, BD), load_rows(p_g, o_n, m_n, stride_gn, DV, BDV)
            b_lse = tl.load(lse + i_row + o_n, mask=m_n, other=float("inf"))
            b_delta = tl.load(delta + i_row + o_n, mask=m_n, other=0.0)
            m_s = (o_c < C)[:, None]
            if CAUSAL:
                m_s = m_s & ((o_c * STRIDE + (LENGTH - 1))[:, None] <= o_n[None, :])
            # [BK, T]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PREC) * (scale * LOG2E)
            b_p = tl.where(m_s, tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PREC)
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision=PREC) - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PREC)
    i_part = (i_kv * SPLITS + i_s) * C
    store_rows(part_k + i_part * D, o_c, o_c < C, D, b_dk * scale, D, BD)
    store_rows(part_v + i_part * DV, o_c, o_c < C, DV, b_dv, DV, BDV)
