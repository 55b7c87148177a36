"""Kernels of the choice: importances of blocks of tokens, and the most important blocks of every query."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows
from ..topk import keep_top, sortable
from ._tile import stairs


@triton.jit
def importance_kernel(
    q, k, lse, score, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    H, N, C, E, first_row, R, TILES, PARTS, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BE: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Importances `score: [B Hkv, R, E]` of BE blocks for T of a slab's R queries. A causal query's later blocks are left alone."""
    i_e, i_rest = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    i_t, i_kv = i_rest % TILES, (i_rest // TILES).to(tl.int64)
    o_r = i_t * T + tl.arange(0, T)
    o_n = first_row + o_r
    m_n = (o_r < R) & (o_n < N)
    if CAUSAL:  # noqa: SIM102 (a constant, unlike the other)
        if i_e * BE * BLOCK > first_row + i_t * T + T - 1:
            return
    PER: tl.constexpr = BLOCK // STRIDE
    COVERS: tl.constexpr = LENGTH // STRIDE
    HK = H // G
    i_b, i_hk = i_kv // HK, i_kv % HK
    o_e = i_e * BE + tl.arange(0, BE)
    # [T, BE]
    b_score = tl.zeros([T, BE], tl.float32)
    for i_g in range(G):
        i_h = i_hk * G + i_g
        b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD)
        b_lse = tl.load(lse + (i_b * H + i_h) * N + o_n, mask=m_n, other=float("inf"))
        for i in range(PER + COVERS - 1):
            # compressed keys that begin `ahead` strides after their block
            ahead = i - (COVERS - 1)
            weight = tl.minimum(tl.minimum(COVERS, PER - ahead), COVERS + ahead)
            o_c = o_e * PER + ahead
            b_k = load_rows(k + i_b * stride_kb + i_hk * stride_kh, o_c, (o_c >= 0) & (o_c < C), stride_kn, D, BD)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * (scale * LOG2E)
            m_s = stairs(o_n, o_c, C, STRIDE, LENGTH, CAUSAL)
            b_score += weight * tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0)
    p_score = score + (i_kv * R + o_r)[:, None] * E + o_e[None, :]
    tl.store(p_score, b_score, mask=m_n[:, None] & (o_e < E)[None, :])


@triton.jit
def block_select_kernel(
    score, chosen, N, E, first_row, R, first, local,
    BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The K most important blocks of one query, ascending, then -1; the `first` ones and `local` ones up to its own are among them."""
    i_row = tl.program_id(0).to(tl.int64)
    i_kv, i_n = i_row // R, first_row + i_row % R
    if i_n >= N:
        return
    own = (i_n // BLOCK).to(tl.int32)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    if CAUSAL:
        m_e = m_e & (o_e <= own)
    b_x = tl.load(score + i_row * E + o_e, mask=m_e, other=0.0)
    b_x = tl.where((o_e < first) | ((o_e <= own) & (o_e > own - local)), float("inf"), b_x)
    count = tl.minimum(K, tl.sum(m_e.to(tl.int32), 0))
    b_keep, b_place = keep_top(tl.where(m_e, sortable(b_x), 0), count)
    p_chosen = chosen + (i_kv * N + i_n) * K
    tl.store(p_chosen + b_place, o_e, mask=b_keep)
    o_k = tl.arange(0, KP)
    tl.store(p_chosen + o_k, tl.full([KP], -1, tl.int32), mask=(o_k >= count) & (o_k < K))
