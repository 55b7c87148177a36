"""Kernels of regions whose queries read the same blocks: one program a tile of a region's queries, no partial results."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows, store_rows
from ._tile import attend, block_tokens, finish, score_gradient, store_output


@triton.jit
def read_tokens(chosen, members, i_r, o_u, S: tl.constexpr, W: tl.constexpr):
    """(tokens, which of them exist) of units `o_u` of the S W that region `i_r` reads, block after block of `chosen: [B E, S]`."""
    m_u = o_u < S * W
    b_e = tl.load(chosen + i_r * S + o_u // W, mask=m_u, other=-1)
    b_t = tl.load(members + tl.maximum(b_e, 0) * W + o_u % W, mask=m_u & (b_e >= 0), other=-1)
    return tl.maximum(b_t, 0), b_t >= 0


@triton.jit
def region_attend_kernel(
    q, k, v, chosen, members, out, low, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, E, TILES, scale,
    G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs and base-2 log-sum-exps of T queries of a region in one head."""
    i_t, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_e, i_bh = i_rest % E, i_rest // E
    i_b, i_h = i_bh // H, i_bh % H
    o_q, m_q = block_tokens(members, i_e, i_t * T + tl.arange(0, T), N, W, True)
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    p_v = v + i_b.to(tl.int64) * stride_vb + (i_h // G).to(tl.int64) * stride_vh
    # [T, BD]
    b_q = load_rows(q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh, o_q, m_q, stride_qn, D, BD)
    b_max = tl.full([T], float("-inf"), tl.float32)
    b_sum = tl.zeros([T], tl.float32)
    b_acc = tl.zeros([T, BDV], tl.float32)
    for i in range(0, S * W, BK):
        b_t, m_t = read_tokens(chosen, members, i_b * E + i_e, i + tl.arange(0, BK), S, W)
        # [BK, BD], [BK, BDV]
        b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
        m_s = m_t[None, :] & (b_t[None, :] <= o_q[:, None]) if CAUSAL else m_t[None, :]
        b_max, b_sum, b_acc = attend(b_q, b_k, b_v, m_s, scale * LOG2E, b_max, b_sum, b_acc, PREC)
    i_row = i_bh.to(tl.int64) * N
    b_out, b_lse = finish(b_max, b_sum, b_acc)
    store_output(out + i_row * DV, low + i_row * DV, o_q, m_q, b_out, LOW, DV, BDV)
    tl.store(lse + i_row + o_q, b_lse, mask=m_q)


@triton.jit
def region_query_gradient_kernel(
    grad, q, k, v, lse, delta, chosen, members, dq,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, E, TILES, scale,
    G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of T queries of a region in one head."""
    i_t, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_e, i_bh = i_rest % E, i_rest // E
    i_b, i_h = i_bh // H, i_bh % H
    o_q, m_q = block_tokens(members, i_e, i_t * T + tl.arange(0, T), N, W, True)
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    p_v = v + i_b.to(tl.int64) * stride_vb + (i_h // G).to(tl.int64) * stride_vh
    # [T, BD], [T, BDV]
    b_q = load_rows(q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh, o_q, m_q, stride_qn, D, BD)
    b_g = load_rows(grad + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh, o_q, m_q, stride_gn, DV, BDV)
    i_row = i_bh.to(tl.int64) * N
    b_lse = tl.load(lse + i_row + o_q, mask=m_q, other=float("inf"))
    b_delta = tl.load(delta + i_row + o_q, mask=m_q, other=0.0)
    b_dq = tl.zeros([T, BD], tl.float32)
    for i in range(0, S * W, BK):
        b_t, m_t = read_tokens(chosen, members, i_b * E + i_e, i + tl.arange(0, BK), S, W)
        b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
        m_s = m_t[None, :] & (b_t[None, :] <= o_q[:, None]) if CAUSAL else m_t[None, :]
        b_ds = score_gradient(b_q, b_k, b_g, b_v, m_s, scale * LOG2E, b_lse, b_delta, PREC)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC)
    store_rows(dq + i_row * D, o_q, m_q, D, b_dq * scale, D, BD)
