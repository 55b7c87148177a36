"""The attention kernel: a tile of queries against the compressed keys that they see."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows
from ..blocks._tile import attend, finish, store_output
from ._tile import stairs, visible


@triton.jit
def compressed_attend_kernel(
    q, k, v, out, low, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs and base-2 log-sum-exps of T queries."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n = i_t * T + tl.arange(0, T)
    m_n = o_n < N
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    # [T, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD)
    b_max = tl.full([T], float("-inf"), tl.float32)
    b_sum = tl.zeros([T], tl.float32)
    b_acc = tl.zeros([T, BDV], tl.float32)
    for i in range(0, visible(tl.minimum(N, i_t * T + T) - 1, C, STRIDE, LENGTH, CAUSAL), BK):
        o_c = i + tl.arange(0, BK)
        b_k, b_v = load_rows(p_k, o_c, o_c < C, stride_kn, D, BD), load_rows(p_v, o_c, o_c < C, stride_vn, DV, BDV)
        m_s = stairs(o_n, o_c, C, STRIDE, LENGTH, CAUSAL)
        b_max, b_sum, b_acc = attend(b_q, b_k, b_v, m_s, scale * LOG2E, b_max, b_sum, b_acc, PREC)
    i_row = i_bh.to(tl.int64) * N
    b_out, b_lse = finish(b_max, b_sum, b_acc)
    store_output(out + i_row * DV, low + i_row * DV, o_n, m_n, b_out, LOW, DV, BDV)
    tl.store(lse + i_row + o_n, b_lse, mask=m_n)
