"""Kernels that make landmarks: pooling of the queries, and one pass over keys and values split over the sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, head_offset, load_rows, store_rows
from ._tile import online_softmax


@triton.jit
def pool_kernel(
    q, r, stride_b, stride_h, stride_n, H, prefix, GH, GW, PH, PW,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adaptive average of one bin of a GH x GW token grid: one program a (head, landmark)."""
    i_m, i_bh = tl.program_id(0) % (PH * PW), tl.program_id(0) // (PH * PW)
    i_y, i_x = i_m // PW, i_m % PW
    y0, y1 = i_y * GH // PH, ((i_y + 1) * GH + PH - 1) // PH
    x0, x1 = i_x * GW // PW, ((i_x + 1) * GW + PW - 1) // PW
    width = x1 - x0
    area = (y1 - y0) * width
    p_q = q + head_offset(i_bh, H, 1, stride_b, stride_h)
    # [BT, BD]
    b_sum = tl.zeros([BT, BD], tl.float32)
    for start in range(0, area, BT):
        o_t = start + tl.arange(0, BT)
        o_row = prefix + x0 + (o_t if GH == 1 else (y0 + o_t // width) * GW + o_t % width)
        b_sum += load_rows(p_q, o_row, o_t < area, stride_n, D, BD).to(tl.float32)
    # [BD]
    b_mean = tl.sum(b_sum, 0) / area
    o_d = tl.arange(0, BD)
    p_r = r + tl.program_id(0).to(tl.int64) * D + o_d
    tl.store(p_r, b_mean.to(r.dtype.element_ty), mask=o_d < D)


@triton.jit
def probe_kernel(
    r, k, v, chunk_max, part_acc, part_max, part_sum,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, SPLITS, BLOCKS, scale,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, C: tl.constexpr,
    MT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Landmarks against one split of the keys: partial softmax over values, and the maximum score of every chunk.

    A chunk is C keys of a block of BN: key c + i (BN / C) of the block belongs to its chunk c, for i < C.
    """
    i_s, i_rest = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    i_m, i_bh = i_rest % MT, i_rest // MT
    first, last = i_s * BLOCKS // SPLITS, (i_s + 1) * BLOCKS // SPLITS
    PER: tl.constexpr = BN // C
    p_k = k + head_offset(i_bh, H, G, stride_kb, stride_kh)
    p_v = v + head_offset(i_bh, H, G, stride_vb, stride_vh)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_row = i_bh.to(tl.int64) * M + o_m
    # [BM, BD]
    b_r = load_rows(r + i_bh.to(tl.int64) * M * D, o_m, m_m, D, D, BD)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BDV], tl.float32)
    for i_n in range(first, last):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        # [BN, BD]
        b_k = load_rows(p_k, o_n, m_n, stride_kn, D, BD)
        # [BM, BN]
        b_s = tl.dot(b_r, tl.trans(b_k), input_precision=PREC)
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        if ROUTED:
            # [BM, PER]
            b_top = tl.max(tl.reshape(b_s, [BM, C, PER]), 1)
            o_c = i_n * PER + tl.arange(0, PER)
            p_c = chunk_max + o_row[:, None] * (BLOCKS * PER) + o_c[None, :]
            tl.store(p_c, b_top, mask=m_m[:, None])
        if SHARED:
            # [BN, BDV]
            b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
            b_max, b_sum, b_acc = online_softmax(b_s * (scale * LOG2E), b_v, b_max, b_sum, b_acc, PREC)
    if SHARED:
        o_part = (i_bh * SPLITS + i_s).to(tl.int64) * M + o_m
        tl.store(part_max + o_part, b_max, mask=m_m)
        tl.store(part_sum + o_part, b_sum, mask=m_m)
        store_rows(part_acc, o_part, m_m, DV, b_acc, DV, BDV)
