"""Device functions that the MiTA kernels share: the online softmax, segments of an expert, bins of landmarks."""

from __future__ import annotations

import triton
import triton.language as tl


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
