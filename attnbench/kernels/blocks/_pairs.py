"""Kernels of pairs, a query and a block that it reads, sorted by block: one program a run of pairs of one block.

A query in S pairs gets S partial outputs, merged by their log-sum-exp, and S partial gradients, added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows, store_rows
from ._tile import attend, block_tokens, finish, score_gradient, store_output


@triton.jit
def pair_head(i_w, first_head, ITEMS, H, HR):
    """Of program `i_w`: (batch element, head, place among the heads of this launch, item of its route head)."""
    i_l = i_w // ITEMS
    i_bh = first_head + i_l
    i_b, i_h = i_bh // H, i_bh % H
    i_x = i_b * HR + i_h // (H // HR)
    return i_b, i_h, i_l, i_x, (i_x * ITEMS + i_w % ITEMS).to(tl.int64)


@triton.jit
def pair_attend_kernel(
    q, k, v, order, items, part, low, part_lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, HR, N, M, ITEMS, first_head, scale,
    G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs and base-2 log-sum-exps of the pairs of one item, T at a time, at row `S query + slot` of their head."""
    i_b, i_h, i_l, i_x, i_item = pair_head(tl.program_id(0), first_head, ITEMS, H, HR)
    i_e, first, last = tl.load(items + 3 * i_item), tl.load(items + 3 * i_item + 1), tl.load(items + 3 * i_item + 2)
    if first >= last:
        return
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    p_v = v + i_b.to(tl.int64) * stride_vb + (i_h // G).to(tl.int64) * stride_vh
    i_row = i_l.to(tl.int64) * N * S
    o_j = tl.arange(0, BK)
    b_t, m_t = block_tokens(order, i_e, o_j, M, W, False)
    if W <= BK:
        # [BK, BD], [BK, BDV]
        b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
    for i in range(first, last, T):
        o_p = i + tl.arange(0, T)
        m_q = o_p < last
        b_pair = tl.load(order + o_p, mask=m_q, other=0) - i_x * N * S
        o_n = b_pair // S
        # [T, BD]
        b_q = load_rows(p_q, o_n, m_q, stride_qn, D, BD)
        b_max = tl.full([T], float("-inf"), tl.float32)
        b_sum = tl.zeros([T], tl.float32)
        b_acc = tl.zeros([T, BDV], tl.float32)
        for i_j in range(0, W, BK):
            if W > BK:
                b_t, m_t = block_tokens(order, i_e, i_j + o_j, M, W, False)
                b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
            m_s = m_t[None, :] & (b_t[None, :] <= o_n[:, None]) if CAUSAL else m_t[None, :]
            b_max, b_sum, b_acc = attend(b_q, b_k, b_v, m_s, scale * LOG2E, b_max, b_sum, b_acc, PREC)
        b_out, b_lse = finish(b_max, b_sum, b_acc)
        store_output(part + i_row * DV, low + i_row * DV, b_pair, m_q, b_out, LOW, DV, BDV)
        tl.store(part_lse + i_row + b_pair, b_lse, mask=m_q)


@triton.jit
def merge_kernel(
    part, part_lse, routes, out, low, lse, H, HR, N, NB, first_head,
    S: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BDV: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Merge the partial outputs of every query by their log-sum-exp; a query that reads nothing has output 0 and lse +inf."""
    i_l = tl.program_id(0) // NB
    i_bh = (first_head + i_l).to(tl.int64)
    i_x = (i_bh // H) * HR + (i_bh % H) // (H // HR)
    o_n = (tl.program_id(0) % NB) * BT + tl.arange(0, BT)
    m_n = o_n < N
    p_route = routes + (i_x * N + o_n) * S
    i_row = i_l.to(tl.int64) * N
    p_lse = part_lse + (i_row + o_n) * S
    b_max = tl.full([BT], float("-inf"), tl.float32)
    for i in range(S):
        m_s = m_n & (tl.load(p_route + i, mask=m_n, other=-1) >= 0)
        b_l = tl.load(p_lse + i, mask=m_s, other=float("-inf"))
        b_max = tl.maximum(b_max, tl.where(b_l == float("inf"), float("-inf"), b_l))
    b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BT], tl.float32)
    # [BT, BDV]
    b_acc = tl.zeros([BT, BDV], tl.float32)
    for i in range(S):
        m_s = m_n & (tl.load(p_route + i, mask=m_n, other=-1) >= 0)
        b_l = tl.load(p_lse + i, mask=m_s, other=float("inf"))
        b_w = tl.where(b_l == float("inf"), 0.0, tl.exp2(b_l - b_safe))
        b_sum += b_w
        b_acc += b_w[:, None] * load_rows(part + i_row * S * DV, o_n * S + i, m_s, DV, DV, BDV)
    b_out, b_lse = finish(b_max, b_sum, b_acc)
    store_output(out + i_bh * N * DV, low + i_bh * N * DV, o_n, m_n, b_out, LOW, DV, BDV)
    tl.store(lse + i_bh * N + o_n, b_lse, mask=m_n)


@triton.jit
def pair_query_gradient_kernel(
    grad, q, k, v, lse, delta, order, items, part,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, HR, N, M, ITEMS, first_head, scale,
    G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of the pairs of one item, at row `S query + slot` of their head."""
    i_b, i_h, i_l, i_x, i_item = pair_head(tl.program_id(0), first_head, ITEMS, H, HR)
    i_e, first, last = tl.load(items + 3 * i_item), tl.load(items + 3 * i_item + 1), tl.load(items + 3 * i_item + 2)
    if first >= last:
        return
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_g = grad + i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    p_k = k + i_b.to(tl.int64) * stride_kb + (i_h // G).to(tl.int64) * stride_kh
    p_v = v + i_b.to(tl.int64) * stride_vb + (i_h // G).to(tl.int64) * stride_vh
    i_bh = (i_b * H + i_h).to(tl.int64)
    i_row = i_l.to(tl.int64) * N * S
    o_j = tl.arange(0, BK)
    b_t, m_t = block_tokens(order, i_e, o_j, M, W, False)
    if W <= BK:
        b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
    for i in range(first, last, T):
        o_p = i + tl.arange(0, T)
        m_q = o_p < last
        b_pair = tl.load(order + o_p, mask=m_q, other=0) - i_x * N * S
        o_n = b_pair // S
        # [T, BD], [T, BDV]
        b_q, b_g = load_rows(p_q, o_n, m_q, stride_qn, D, BD), load_rows(p_g, o_n, m_q, stride_gn, DV, BDV)
        b_lse = tl.load(lse + i_bh * N + o_n, mask=m_q, other=float("inf"))
        b_delta = tl.load(delta + i_bh * N + o_n, mask=m_q, other=0.0)
        b_dq = tl.zeros([T, BD], tl.float32)
        for i_j in range(0, W, BK):
            if W > BK:
                b_t, m_t = block_tokens(order, i_e, i_j + o_j, M, W, False)
                b_k, b_v = load_rows(p_k, b_t, m_t, stride_kn, D, BD), load_rows(p_v, b_t, m_t, stride_vn, DV, BDV)
            m_s = m_t[None, :] & (b_t[None, :] <= o_n[:, None]) if CAUSAL else m_t[None, :]
            b_ds = score_gradient(b_q, b_k, b_g, b_v, m_s, scale * LOG2E, b_lse, b_delta, PREC)
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC)
        store_rows(part + i_row * D, b_pair, m_q, D, b_dq * scale, D, BD)


@triton.jit
def sum_kernel(
    part, routes, dq, H, HR, N, NB, first_head, S: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add up the partial gradients of every query."""
    i_l = tl.program_id(0) // NB
    i_bh = (first_head + i_l).to(tl.int64)
    i_x = (i_bh // H) * HR + (i_bh % H) // (H // HR)
    o_n = (tl.program_id(0) % NB) * BT + tl.arange(0, BT)
    m_n = o_n < N
    b_dq = tl.zeros([BT, BD], tl.float32)
    for i in range(S):
        m_s = m_n & (tl.load(routes + (i_x * N + o_n) * S + i, mask=m_n, other=-1) >= 0)
        b_dq += load_rows(part + i_l.to(tl.int64) * N * S * D, o_n * S + i, m_s, D, D, BD).to(tl.float32)
    store_rows(dq + i_bh * N * D, o_n, m_n, D, b_dq, D, BD)
