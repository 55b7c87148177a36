"""Kernels of pairs, backward: gradients of queries over the keys, and of keys and values over the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import load_rows, store_rows
from ._tile import flag_of, query_tile, visible, weights_of


@triton.jit
def spark_query_gradient_kernel(
    q, k, v, grad, lse, used, delta, flags, dq,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries; `delta` is `grad . out`."""
    i_t, wanted, o_q, m_q, o_row, p_q, p_k, p_v = query_tile(
        q, k, v, flags, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES, G, BQ, SOME
    )
    if wanted == 0:
        return
    b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
    b_g = load_rows(grad, o_row, m_q, DV, DV, BDV)
    b_lse, b_limit = tl.load(lse + o_row, mask=m_q, other=0.0), tl.load(used + o_row, mask=m_q, other=0.0)
    b_delta = tl.load(delta + o_row, mask=m_q, other=0.0)
    b_dqr = tl.zeros([BQ, BR], tl.float32)
    b_dqs = tl.zeros([BQ, BS], tl.float32)
    last = M
    if CAUSAL:
        last = tl.minimum(M, (i_t + 1) * BQ)
    for start in range(0, last, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < M
        b_kr, b_ks = load_rows(p_k, o_n, m_n, stride_kn, R, BR), load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
        m_s = visible(o_q, o_n, M, CAUSAL)
        b_p, b_gate, b_slope = weights_of(b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC)
        b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
        b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PREC)
        b_dqs += tl.dot((b_p * b_dw * b_slope).to(b_ks.dtype), b_ks, input_precision=PREC)
        b_dqr += tl.dot((b_p * (b_dw * b_gate - b_delta[:, None])).to(b_kr.dtype), b_kr, input_precision=PREC)
    store_rows(dq, o_row, m_q, R + S, b_dqr * scale, R, BR)
    store_rows(dq + R, o_row, m_q, R + S, b_dqs * scale_s, S, BS)


@triton.jit
def spark_key_gradient_kernel(
    q, k, v, grad, lse, used, delta, flags, some, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one key head, over the queries of its G heads; with SOME added to what is there, where `some` is 1."""
    wanted = 1
    if SOME:
        wanted = tl.load(some)
    if wanted == 0:
        return
    i_t, i_kv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    heads = H // G
    i_b, i_h = (i_kv // heads).to(tl.int64), (i_kv % heads).to(tl.int64)
    o_n = i_t * BN + tl.arange(0, BN)
    m_n = o_n < M
    p_k, p_v = k + i_b * stride_kb + i_h * stride_kh, v + i_b * stride_vb + i_h * stride_vh
    b_kr, b_ks = load_rows(p_k, o_n, m_n, stride_kn, R, BR), load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
    b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
    b_dkr = tl.zeros([BN, BR], tl.float32)
    b_dks = tl.zeros([BN, BS], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    first = 0
    if CAUSAL:
        first = i_t * BN // BQ * BQ
    for g in range(G):
        i_q = i_h * G + g
        p_q = q + i_b * stride_qb + i_q * stride_qh
        for start in range(first, N, BQ):
            if SOME:
                wanted = tl.load(flag_of(flags, i_b * H + i_q, N, start))
            if wanted != 0:
                o_q = start + tl.arange(0, BQ)
                m_q = o_q < N
                o_row = (i_b * H + i_q) * N + o_q
                b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
                b_lse, b_limit = tl.load(lse + o_row, mask=m_q, other=0.0), tl.load(used + o_row, mask=m_q, other=0.0)
                m_s = visible(o_q, o_n, M, CAUSAL) & m_q[:, None]
                b_p, b_gate, b_slope = weights_of(b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC)
                b_g = load_rows(grad, o_row, m_q, DV, DV, BDV)
                b_dv += tl.dot(tl.trans((b_p * b_gate).to(b_g.dtype)), b_g, input_precision=PREC)
                b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PREC)
                b_dks += tl.dot(tl.trans((b_p * b_dw * b_slope).to(b_qs.dtype)), b_qs, input_precision=PREC)
                b_ds = b_p * (b_dw * b_gate - tl.load(delta + o_row, mask=m_q, other=0.0)[:, None])
                b_dkr += tl.dot(tl.trans(b_ds.to(b_qr.dtype)), b_qr, input_precision=PREC)
    o_row = i_kv.to(tl.int64) * M + o_n
    if SOME:
        b_dkr += load_rows(dk, o_row, m_n, R + S, R, BR) / scale
        b_dks += load_rows(dk + R, o_row, m_n, R + S, S, BS) / scale_s
        b_dv += load_rows(dv, o_row, m_n, DV, DV, BDV)
    store_rows(dk, o_row, m_n, R + S, b_dkr * scale, R, BR)
    store_rows(dk + R, o_row, m_n, R + S, b_dks * scale_s, S, BS)
    store_rows(dv, o_row, m_n, DV, b_dv, DV, BDV)
