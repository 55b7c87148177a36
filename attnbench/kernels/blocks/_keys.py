"""Kernels of the gradients of keys and values: sums over the queries that read a block, a run of pairs a program, then over runs."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows, store_rows
from ._tile import block_tokens


@triton.jit
def delta_kernel(
    grad, out, low, delta, stride_gb, stride_gh, stride_gn, H, N, NB,
    DV: tl.constexpr, BT: tl.constexpr, BDV: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """`delta = grad . output` of every query, the output as it was before it was rounded."""
    i_bh = tl.program_id(0) // NB
    i_b, i_h, i_row = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64) * N
    o_n = (tl.program_id(0) % NB) * BT + tl.arange(0, BT)
    m_n = o_n < N
    b_g = load_rows(grad + i_b * stride_gb + i_h * stride_gh, o_n, m_n, stride_gn, DV, BDV).to(tl.float32)
    b_o = load_rows(out + i_row * DV, o_n, m_n, DV, DV, BDV).to(tl.float32)
    if LOW:
        b_o += load_rows(low + i_row * DV, o_n, m_n, DV, DV, BDV).to(tl.float32)
    tl.store(delta + i_row + o_n, tl.sum(b_g * b_o, 1), mask=m_n)


@triton.jit
def key_gradient_kernel(
    grad, q, k, v, lse, delta, order, items, members, part_k, part_v,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, HR, N, M, PAIRS, ITEMS, TILES, scale,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, REGIONS: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BK keys and values of a block over the pairs of one item, of one of the C key heads of its route head.

    A pair is a query, or with REGIONS the W tokens of a region. Summed are the query heads that share key head and route head.
    """
    i_j, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_c, i_item = i_rest % C, (i_rest // C).to(tl.int64)
    i_x = (i_item // ITEMS).to(tl.int32)
    i_b, i_hr = i_x // HR, i_x % HR
    i_e, first, last = tl.load(items + 3 * i_item), tl.load(items + 3 * i_item + 1), tl.load(items + 3 * i_item + 2)
    if first >= last:
        return
    UNIT: tl.constexpr = W if REGIONS else 1
    heads = H // (HR * C)
    first_head = (i_hr * C + i_c) * heads
    i_kv = (first_head // G).to(tl.int64)
    o_j = i_j * BK + tl.arange(0, BK)
    b_t, m_t = block_tokens(members, i_e, o_j, M, W, REGIONS)
    # [BK, BD], [BK, BDV]
    b_k = load_rows(k + i_b.to(tl.int64) * stride_kb + i_kv * stride_kh, b_t, m_t, stride_kn, D, BD)
    b_v = load_rows(v + i_b.to(tl.int64) * stride_vb + i_kv * stride_vh, b_t, m_t, stride_vn, DV, BDV)
    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BDV], tl.float32)
    for i_h in range(first_head, first_head + heads):
        i_bh = i_b.to(tl.int64) * H + i_h
        p_q = q + (i_bh // H) * stride_qb + (i_bh % H) * stride_qh
        p_g = grad + (i_bh // H) * stride_gb + (i_bh % H) * stride_gh
        for i in range(first * UNIT, last * UNIT, T):
            o_u = i + tl.arange(0, T)
            m_q = o_u < last * UNIT
            o_n = (tl.load(order + o_u // UNIT, mask=m_q, other=0) - i_x * PAIRS) // S
            if REGIONS:
                o_n = tl.load(members + tl.maximum(o_n, 0) * W + o_u % W, mask=m_q, other=-1)
                m_q = o_n >= 0
            # [T, BD], [T, BDV]
            b_q, b_g = load_rows(p_q, o_n, m_q, stride_qn, D, BD), load_rows(p_g, o_n, m_q, stride_gn, DV, BDV)
            b_lse = tl.load(lse + i_bh * N + o_n, mask=m_q, other=float("inf"))
            b_delta = tl.load(delta + i_bh * N + o_n, mask=m_q, other=0.0)
            m_s = m_t[:, None] & (b_t[:, None] <= o_n[None, :]) if CAUSAL else m_t[:, None]
            # [BK, T]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PREC) * (scale * LOG2E)
            b_p = tl.where(m_s, tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PREC)
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision=PREC) - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PREC)
    i_part = (i_item * C + i_c) * W
    store_rows(part_k + i_part * D, o_j, o_j < W, D, b_dk * scale, D, BD)
    store_rows(part_v + i_part * DV, o_j, o_j < W, DV, b_dv, DV, BDV)


@triton.jit
def key_sum_kernel(
    part, start, members, dx, HK, HR, M, E, ITEMS, TILES,
    R: tl.constexpr, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, REGIONS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of BK keys, or values, of a block over the items of the R route heads of its key head."""
    i_j, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_e, i_kv = i_rest % E, i_rest // E
    i_b, i_hk = i_kv // HK, i_kv % HK
    o_j = i_j * BK + tl.arange(0, BK)
    b_t, m_t = block_tokens(members, i_e, o_j, M, W, REGIONS)
    b_dx = tl.zeros([BK, BD], tl.float32)
    for i_r in range(0, R):
        i_x = i_b * HR + (i_hk // C) * R + i_r
        p_s = start + i_x * (E + 1) + i_e
        for i in range(tl.load(p_s), tl.load(p_s + 1)):
            i_part = ((i_x.to(tl.int64) * ITEMS + i) * C + i_hk % C) * W
            b_dx += load_rows(part + i_part * D, o_j, m_t, D, D, BD)
    store_rows(dx + i_kv.to(tl.int64) * M * D, b_t, m_t, D, b_dx, D, BD)
