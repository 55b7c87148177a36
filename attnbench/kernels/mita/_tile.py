"""Device functions that the MiTA kernels share: loads of rows, the online softmax, the segments of an expert."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
"""`exp(x) = exp2(LOG2E x)`"""


@triton.jit
def load_rows(p_base, o_row, m_row, stride, D: tl.constexpr, BD: tl.constexpr):
    """Rows `o_row` of a matrix with unit inner stride as `[len(o_row), BD]`, zero outside."""
    o_d = tl.arange(0, BD)
    p_row = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if D == BD:
        b_row = tl.load(p_row, mask=m_row[:, None], other=0.0)
    else:
        b_row = tl.load(p_row, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    return b_row


@triton.jit
def store_rows(p_base, o_row, m_row, stride, b_row, D: tl.constexpr, BD: tl.constexpr):
    """Write `b_row: [len(o_row), BD]` to rows `o_row`."""
    o_d = tl.arange(0, BD)
    p_row = p_base + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    b_row = b_row.to(p_base.dtype.element_ty)
    if D == BD:
        tl.store(p_row, b_row, mask=m_row[:, None])
    else:
        tl.store(p_row, b_row, mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def online_softmax(b_s, b_v, b_max, b_sum, b_acc, PREC: tl.constexpr):
    """Fold logits `b_s: [R, C]` (base 2, -inf where masked) and values `b_v: [C, BDV]` into a running softmax."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_decay = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PREC)
    return b_new, b_sum, b_acc


@triton.jit
def attend_both(b_q, b_r, b_u, m_r, scale_r, b_k, b_v, m_k, scale_k, PREC: tl.constexpr):
    """One softmax over two tiles of keys with scales of their own (base 2): its maximum, sum and unnormalised output."""
    b_x = tl.where(m_r, tl.dot(b_q, tl.trans(b_r), input_precision=PREC) * scale_r, float("-inf"))
    b_y = tl.where(m_k, tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale_k, float("-inf"))
    b_max = tl.maximum(tl.max(b_x, 1), tl.max(b_y, 1))
    b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_x, b_y = tl.exp2(b_x - b_safe[:, None]), tl.exp2(b_y - b_safe[:, None])
    b_acc = tl.dot(b_x.to(b_u.dtype), b_u, input_precision=PREC)
    return b_max, tl.sum(b_x, 1) + tl.sum(b_y, 1), tl.dot(b_y.to(b_v.dtype), b_v, b_acc, input_precision=PREC)


@triton.jit
def head_offset(i_bh, H, G: tl.constexpr, stride_b, stride_h):
    """Offset of head `i_bh` of B x H in a tensor with H / G heads."""
    return (i_bh // H).to(tl.int64) * stride_b + ((i_bh % H) // G).to(tl.int64) * stride_h


@triton.jit
def attend_to(b_q, b_k, b_v, m_k, scale, b_max, b_sum, b_acc, PREC: tl.constexpr):
    """Fold keys `b_k: [C, BD]` that `m_k` (broadcast to `[R, C]`) allows, and their values, into a running softmax; `scale` is base 2."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale
    b_s = tl.where(m_k, b_s, float("-inf"))
    return online_softmax(b_s, b_v, b_max, b_sum, b_acc, PREC)


@triton.jit
def segment_of(segment, i_row):
    """(expert, first pair, last pair + 1) of row `i_row` of a table of segments; first = last where there is no such segment."""
    p_row = segment + i_row * 4
    return tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)


@triton.jit
def averaged(bins, o_n, m_n, i_m, M: tl.constexpr, BM: tl.constexpr):
    """`[len(o_n), BM]`, 1 where a landmark of `i_m .. i_m + BM` averages a token of `o_n`; `bins` has a bit for each landmark."""
    WORDS: tl.constexpr = (M + 31) // 32
    p_bits = bins + o_n * WORDS + i_m // 32
    o_bit = i_m % 32 + tl.arange(0, BM)[None, :]
    b_in = tl.load(p_bits, mask=m_n, other=0)[:, None]
    if BM > 32:
        b_high = tl.load(p_bits + 1, mask=m_n & (i_m // 32 + 1 < WORDS), other=0)
        b_in = tl.where(o_bit < 32, b_in, b_high[:, None])
    return (b_in >> (o_bit % 32)) & 1
