"""Device functions that the kernels share: which compressed keys a query reads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visible(last_row, C, STRIDE: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr):
    """How many of C compressed keys a query at position `last_row` reads."""
    count = C
    if CAUSAL:
        count = tl.where(last_row >= LENGTH - 1, tl.minimum(C, (last_row - (LENGTH - 1)) // STRIDE + 1), 0)
    return count


@triton.jit
def stairs(o_n, o_c, C, STRIDE: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr):
    """`[len(o_n), len(o_c)]`, which compressed keys the queries at positions `o_n` read."""
    m_s = ((o_c >= 0) & (o_c < C))[None, :]
    if CAUSAL:
        m_s = m_s & ((o_c * STRIDE + (LENGTH - 1))[None, :] <= o_n[:, None])
    return m_s
