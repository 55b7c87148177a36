"""Kernels of lists: one finds the keys that reach a query's threshold; two gather them, a program a query, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, load_rows
from ..gather import load_row
from ._tile import gate_of, visible


@triton.jit
def spark_list_kernel(
    q, k, limit, index, count, flags, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, H, N, M, TILES,
    G: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, L: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """The keys of a tile of queries that reach their thresholds, how many they are, and whether lists will not do."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    m_q = o_q < N
    o_row = i_bh.to(tl.int64) * N + o_q
    p_k = k + i_b * stride_kb + i_h // G * stride_kh
    # [BQ, BR]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_q, stride_qn, R, BR)
    b_limit = tl.load(limit + o_row, mask=m_q, other=float("inf"))
    b_count = tl.zeros([BQ], tl.int32)
    last = M
    if CAUSAL:
        last = tl.minimum(M, (i_t + 1) * BQ)
    for start in range(0, last, BN):
        o_n = start + tl.arange(0, BN)
        b_k = load_rows(p_k, o_n, o_n < M, stride_kn, R, BR)
        # [BQ, BN]
        m_s = visible(o_q, o_n, M, CAUSAL) & m_q[:, None]
        b_keep = (m_s & (tl.dot(b_q, tl.trans(b_k), input_precision=PREC) >= b_limit[:, None])).to(tl.int32)
        b_own = tl.sum(b_keep, 1)
        if tl.max(b_own, 0) > 0:
            b_place = b_count[:, None] + tl.cumsum(b_keep, 1) - 1
            p_list = index + o_row[:, None] * L + b_place
            tl.store(p_list, tl.broadcast_to(o_n[None, :], [BQ, BN]), mask=(b_keep > 0) & (b_place < L))
        b_count += b_own
    tl.store(count + o_row, b_count, mask=m_q)
    tl.store(flags + i_bh * TILES + i_t, tl.max((m_q & ((b_count == 0) | (b_count > L))).to(tl.int32), 0))


@triton.jit
def listed_query(
    q, k, v, flags, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES,
    G: tl.constexpr, TQ: tl.constexpr,
):  # fmt: skip
    """Of the query of a program: its row among those of all heads, the flag of its tile, and where it, its keys and its values begin."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_row // N, i_row % N
    i_b, i_h = i_bh // H, i_bh % H
    p_q = q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qn
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    return i_row, tl.load(flags + i_bh * TILES + i_q // TQ), p_q, p_k, p_v


@triton.jit
def listed_rows(
    p_index, start, n, p_k, p_v, stride_kn, stride_vn,
    R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BK entries of a list of n: tokens, which of them are there, and both parts of their keys `[BK, BR]`, `[BK, BS]` and values."""
    o_k = start + tl.arange(0, BK)
    m_k = o_k < n
    b_j = tl.load(p_index + o_k, mask=m_k, other=0)
    b_kr = load_rows(p_k, b_j, m_k, stride_kn, R, BR).to(tl.float32)
    b_ks = load_rows(p_k + R, b_j, m_k, stride_kn, S, BS).to(tl.float32)
    return b_j, m_k, b_kr, b_ks, load_rows(p_v, b_j, m_k, stride_vn, DV, BDV).to(tl.float32)


@triton.jit
def spark_gather_kernel(
    q, k, v, index, count, flags, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    L: tl.constexpr, TQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One query of one head; `lse` is base 2."""
    i_row, flag, p_q, p_k, p_v = listed_query(
        q, k, v, flags, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES, G, TQ
    )
    if flag != 0:
        return
    b_qr, b_qs = load_row(p_q, R, BR) * (scale * LOG2E), load_row(p_q + R, S, BS) * scale_s
    n = tl.load(count + i_row)
    top = float("-inf")
    total = 0.0
    b_acc = tl.zeros([BDV], tl.float32)
    for start in range(0, n, BK):
        _, m_k, b_kr, b_ks, b_v = listed_rows(index + i_row * L, start, n, p_k, p_v, stride_kn, stride_vn, R, S, DV, BR, BS, BDV, BK)
        b_s = tl.where(m_k, tl.sum(b_kr * b_qr, 1), float("-inf"))
        new = tl.maximum(top, tl.max(b_s, 0))
        b_p, decay = tl.exp2(b_s - new), tl.exp2(top - new)
        b_gate, _ = gate_of(tl.sum(b_ks * b_qs, 1))
        total = total * decay + tl.sum(b_p, 0)
        b_acc = b_acc * decay + tl.sum((b_p * b_gate)[:, None] * b_v, 0)
        top = new
    o_v = tl.arange(0, BDV)
    tl.store(out + i_row * DV + o_v, (b_acc / total).to(out.dtype.element_ty), mask=o_v < DV)
    tl.store(lse + i_row, top + tl.log2(total))


@triton.jit
def spark_spread_kernel(
    q, k, v, index, count, flags, grad, lse, delta, dq, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    L: tl.constexpr, TQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq of one query of one head, and its parts of dk and dv, which are contiguous and float32."""
    i_row, flag, p_q, p_k, p_v = listed_query(
        q, k, v, flags, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_vb, stride_vh, H, N, TILES, G, TQ
    )
    if flag != 0:
        return
    i_kv = i_row // N // G
    p_dk, p_dv = dk + i_kv * M * (R + S), dv + i_kv * M * DV
    b_qr, b_qs, b_g = load_row(p_q, R, BR), load_row(p_q + R, S, BS), load_row(grad + i_row * DV, DV, BDV)
    n, own, top = tl.load(count + i_row), tl.load(delta + i_row), tl.load(lse + i_row)
    o_r, o_s, o_v = tl.arange(0, BR), tl.arange(0, BS), tl.arange(0, BDV)
    b_dqr = tl.zeros([BR], tl.float32)
    b_dqs = tl.zeros([BS], tl.float32)
    for start in range(0, n, BK):
        b_j, m_k, b_kr, b_ks, b_v = listed_rows(index + i_row * L, start, n, p_k, p_v, stride_kn, stride_vn, R, S, DV, BR, BS, BDV, BK)
        b_p = tl.where(m_k, tl.exp2(tl.sum(b_kr * b_qr, 1) * (scale * LOG2E) - top), 0.0)
        b_gate, b_slope = gate_of(tl.sum(b_ks * b_qs, 1) * scale_s)
        b_dw = tl.sum(b_v * b_g, 1)
        b_dr, b_ds = b_p * (b_dw * b_gate - own) * scale, b_p * b_dw * b_slope * scale_s
        b_dqr += tl.sum(b_dr[:, None] * b_kr, 0)
        b_dqs += tl.sum(b_ds[:, None] * b_ks, 0)
        o_j, m_j = b_j.to(tl.int64)[:, None], m_k[:, None]
        p_dr = p_dk + o_j * (R + S)
        tl.atomic_add(p_dr + o_r[None, :], b_dr[:, None] * b_qr, mask=m_j & (o_r < R)[None, :], sem="relaxed")
        tl.atomic_add(p_dr + R + o_s[None, :], b_ds[:, None] * b_qs, mask=m_j & (o_s < S)[None, :], sem="relaxed")
        tl.atomic_add(p_dv + o_j * DV + o_v[None, :], (b_p * b_gate)[:, None] * b_g, mask=m_j & (o_v < DV)[None, :], sem="relaxed")
    p_dq = dq + i_row * (R + S)
    tl.store(p_dq + o_r, b_dqr.to(dq.dtype.element_ty), mask=o_r < R)
    tl.store(p_dq + R + o_s, b_dqs.to(dq.dtype.element_ty), mask=o_s < S)
