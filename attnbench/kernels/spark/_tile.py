"""Device functions that the kernels share: what a query sees, the gate, the flag of a tile, and the weights computed anew."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E


@triton.jit
def visible(o_q, o_n, M, CAUSAL: tl.constexpr):
    """`[len(o_q), len(o_n)]`, True where a query sees a key."""
    m_s = (o_n < M)[None, :]
    if CAUSAL:
        m_s = m_s & (o_n[None, :] <= o_q[:, None])
    return m_s


@triton.jit
def gate_of(b_t):
    """`softplus(t)` and its derivative."""
    b_e = tl.exp2(-tl.abs(b_t) * LOG2E)
    b_soft = tl.maximum(b_t, 0.0) + tl.log2(1.0 + b_e) / LOG2E
    return b_soft, tl.where(b_t >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def flag_of(flags, i_bh, N, first):
    """Where the flag of the tile of 64 queries is that holds the one at `first`."""
    return flags + i_bh * ((N + 63) // 64) + first // 64


@triton.jit
def query_tile(
    q, k, v, flags, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES,
    G: tl.constexpr, BQ: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Where the tile of queries of this program is: its number, whether it is wanted, its queries and rows, and its heads' q, k and v."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    wanted = 1
    if SOME:
        wanted = tl.load(flag_of(flags, i_bh, N, i_t * BQ))
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    return i_t, wanted, o_q, o_q < N, i_bh.to(tl.int64) * N + o_q, p_q, p_k, p_v


@triton.jit
def weights_of(
    b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC: tl.constexpr
):  # fmt: skip
    """Softmax weights, gate and the gate's derivative of a tile, `[BQ, BN]` each, computed anew."""
    b_u = tl.dot(b_qr, tl.trans(b_kr), input_precision=PREC)
    b_p = tl.where(m_s & (b_u >= b_limit[:, None]), tl.exp2(b_u * (scale * LOG2E) - b_lse[:, None]), 0.0)
    b_gate, b_slope = gate_of(tl.dot(b_qs, tl.trans(b_ks), input_precision=PREC) * scale_s)
    return b_p, b_gate, b_slope
