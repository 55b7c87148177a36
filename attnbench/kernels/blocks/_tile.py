"""Device functions that the block kernels share: rows of a matrix, tokens of a block, one step of a softmax and of its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import store_rows


@triton.jit
def store_output(p_out, p_low, o_row, m_row, b_out, LOW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Write an output, and with LOW what rounding it took away."""
    store_rows(p_out, o_row, m_row, D, b_out, D, BD)
    if LOW:
        store_rows(p_low, o_row, m_row, D, b_out - b_out.to(p_out.dtype.element_ty).to(tl.float32), D, BD)


@triton.jit
def block_tokens(members, i_e, o_j, M, W: tl.constexpr, REGIONS: tl.constexpr):
    """(tokens, which of them exist) of places `o_j` of block `i_e`: a run of W tokens, or a row of the table `members: [E, W]`."""
    if REGIONS:
        b_t = tl.load(members + i_e * W + o_j, mask=o_j < W, other=-1)
        m_t = b_t >= 0
        b_t = tl.maximum(b_t, 0)
    else:
        b_t = i_e * W + o_j
        m_t = (o_j < W) & (b_t < M)
    return b_t, m_t


@triton.jit
def attend(b_q, b_k, b_v, m_s, scale, b_max, b_sum, b_acc, PREC: tl.constexpr):
    """Fold keys `b_k: [C, BD]` and values `b_v: [C, BDV]` into running softmaxes of queries `b_q: [R, BD]`, logits in base 2."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale
    b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_decay = tl.exp2(b_max - b_safe)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = b_acc * b_decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PREC)
    return b_new, b_sum, b_acc


@triton.jit
def finish(b_max, b_sum, b_acc):
    """Outputs and base-2 log-sum-exps; 0 and +inf where nothing was read, so that probabilities relative to it are 0."""
    b_any = b_sum > 0
    b_total = tl.where(b_any, b_sum, 1.0)
    return b_acc / b_total[:, None], tl.where(b_any, b_max + tl.log2(b_total), float("inf"))


@triton.jit
def score_gradient(b_q, b_k, b_g, b_v, m_s, scale, b_lse, b_delta, PREC: tl.constexpr):
    """Gradients `[R, C]` of the logits, without their factor, of queries with output gradients `b_g: [R, BDV]`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale
    b_p = tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
    return b_p * (tl.dot(b_g, tl.trans(b_v), input_precision=PREC) - b_delta[:, None])
