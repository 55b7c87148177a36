"""Device functions that the MiTA kernels share: loads of rows, the online softmax, the tile of an expert."""

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
def head_offset(i_bh, H, G: tl.constexpr, stride_b, stride_h):
    """Offset of head `i_bh` of B x H in a tensor with H / G heads."""
    return (i_bh // H).to(tl.int64) * stride_b + ((i_bh % H) // G).to(tl.int64) * stride_h


@triton.jit
def expert_of(p_tiles, i_t, M: tl.constexpr, MP: tl.constexpr):
    """The expert that owns tile `i_t`, given the first tile of every expert; M when there is no such tile."""
    o_m = tl.arange(0, MP)
    b_end = tl.load(p_tiles + 1 + o_m, mask=o_m < M, other=2147483647)
    return tl.sum((b_end <= i_t).to(tl.int32), 0)
