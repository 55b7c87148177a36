"""Device functions that all kernels share: rows of a matrix, and where a head begins."""

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
def head_offset(i_bh, H, G: tl.constexpr, stride_b, stride_h):
    """Offset of head `i_bh` of B x H in a tensor with H / G heads."""
    return (i_bh // H).to(tl.int64) * stride_b + ((i_bh % H) // G).to(tl.int64) * stride_h
