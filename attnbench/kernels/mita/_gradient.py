"""Kernels of the backward pass that recompute probabilities: queries, landmarks as keys, landmarks as probes, experts' keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import LOG2E, head_offset, load_rows, store_rows
from ._tile import averaged, segment_of


@triton.jit
def unit_grad(b_q, b_g, b_k, b_v, b_lse, b_delta, m_k, scale, PREC: tl.constexpr):
    """Probabilities and gradients of the logits `[T, C]` of hidden units `b_k, b_v: [C, ..]` for queries `b_q, b_g: [T, ..]`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * (scale * LOG2E)
    b_p = tl.where(m_k[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
    return b_p, b_p * (tl.dot(b_g, tl.trans(b_v), input_precision=PREC) - b_delta[:, None])


@triton.jit
def share_grad(b_share, b_p, b_in, PREC: tl.constexpr):
    """What tokens get from the landmarks that average them (`b_in: [T, BM]`).

    The condition holds for every probability but NaN; it makes the compiler hold `b_in` as it holds `b_p`, a few rows a thread.
    """
    return tl.dot(tl.where(b_p >= 0, b_in, 0).to(b_share.dtype), b_share, input_precision=PREC)


@triton.jit
def query_grad_kernel(
    grad, q, k, v, out, lse, delta, r, value, share, bins, index, order, segment, dq, part, part_v,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, SEGMENTS, MOST, scale, shared_scale,
    K: tl.constexpr, S: tl.constexpr, LENGTH: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, KEYS: tl.constexpr, POOLED: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`dq` of a segment of pairs of one expert, T at a time.

    KEYS: all K keys fit one tile, and their gradients over the segment are summed on the way. Without landmarks `delta = dO . O` is
    written too, else read. POOLED adds to dq what landmarks pass on to the tokens that they average.
    """
    i_s, i_bh = tl.program_id(0) % SEGMENTS, tl.program_id(0) // SEGMENTS
    i_head = i_bh.to(tl.int64)
    i_e, first, last = 0, i_s * LENGTH, tl.minimum(N, (i_s + 1) * LENGTH)
    if ROUTED:
        i_e, first, last = segment_of(segment, i_head * MOST + i_s)
        if first >= last:
            return
    p_q = q + head_offset(i_bh, H, 1, stride_qb, stride_qh)
    p_g = grad + head_offset(i_bh, H, 1, stride_gb, stride_gh)
    p_k = k + head_offset(i_bh, H, G, stride_kb, stride_kh)
    p_v = v + head_offset(i_bh, H, G, stride_vb, stride_vh)
    p_r, p_u, p_j = r + i_head * M * D, value + i_head * M * DV, index + (i_head * M + i_e) * K
    o_m, o_k = tl.arange(0, BM), tl.arange(0, BK)
    m_m, m_k = o_m < M, o_k < K
    if SHARED and M <= BM:
        b_r, b_u = load_rows(p_r, o_m, m_m, D, D, BD), load_rows(p_u, o_m, m_m, DV, DV, BDV)
        if POOLED:
            b_share = load_rows(share + i_head * M * D, o_m, m_m, D, D, BD)
    if ROUTED and K <= BK:
        b_j = tl.load(p_j + o_k, mask=m_k, other=0)
        b_k, b_v = load_rows(p_k, b_j, m_k, stride_kn, D, BD), load_rows(p_v, b_j, m_k, stride_vn, DV, BDV)
    if KEYS:
        # transposed, so that the long side of every product is a dimension of its own
        b_dk = tl.zeros([BD, BK], tl.float32)
        b_dv = tl.zeros([BDV, BK], tl.float32)
    for i in range(first, last, T):
        b_pair = i + tl.arange(0, T)
        m_q = b_pair < last
        if ROUTED:
            b_pair = tl.load(order + i_head * S * N + b_pair, mask=m_q, other=0)
        o_q = b_pair % N if S > 1 else b_pair
        b_q = load_rows(p_q, o_q, m_q, stride_qn, D, BD)
        b_g = load_rows(p_g, o_q, m_q, stride_gn, DV, BDV)
        b_lse = tl.load(lse + i_head * N + o_q, mask=m_q, other=float("inf"))
        if SHARED:
            b_delta = tl.load(delta + i_head * N + o_q, mask=m_q, other=0.0)
        else:
            b_o = load_rows(out + i_head * N * DV, o_q, m_q, DV, DV, BDV)
            b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
            tl.store(delta + i_head * N + o_q, b_delta, mask=m_q & (b_pair < N))
        b_dq = tl.zeros([T, BD], tl.float32)
        if SHARED:
            # slot 0 alone reads landmarks
            b_first = tl.where(b_pair < N, b_lse, float("inf")) if S > 1 else b_lse
            if M <= BM:
                b_pr, b_dr = unit_grad(b_q, b_g, b_r, b_u, b_first, b_delta, m_m, shared_scale, PREC)
                b_dq += tl.dot(b_dr.to(b_r.dtype), b_r, input_precision=PREC) * shared_scale
                if POOLED:
                    b_dq += share_grad(b_share, b_pr, averaged(bins, o_q, m_q, 0, M, BM), PREC)
            else:
                for i_m in range(0, M, BM):
                    m_t = i_m + o_m < M
                    b_r, b_u = load_rows(p_r, i_m + o_m, m_t, D, D, BD), load_rows(p_u, i_m + o_m, m_t, DV, DV, BDV)
                    b_pr, b_dr = unit_grad(b_q, b_g, b_r, b_u, b_first, b_delta, m_t, shared_scale, PREC)
                    b_dq += tl.dot(b_dr.to(b_r.dtype), b_r, input_precision=PREC) * shared_scale
                    if POOLED:
                        b_share = load_rows(share + i_head * M * D, i_m + o_m, m_t, D, D, BD)
                        b_dq += share_grad(b_share, b_pr, averaged(bins, o_q, m_q, i_m, M, BM), PREC)
        if ROUTED and K <= BK:
            b_p, b_ds = unit_grad(b_q, b_g, b_k, b_v, b_lse, b_delta, m_k, scale, PREC)
            if KEYS:
                b_dv += tl.dot(tl.trans(b_g), b_p.to(b_g.dtype), input_precision=PREC)
                b_dk += tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), input_precision=PREC)
            b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC) * scale
        elif ROUTED:
            for i_k in range(0, K, BK):
                m_t = i_k + o_k < K
                b_j = tl.load(p_j + i_k + o_k, mask=m_t, other=0)
                b_k, b_v = load_rows(p_k, b_j, m_t, stride_kn, D, BD), load_rows(p_v, b_j, m_t, stride_vn, DV, BDV)
                _, b_ds = unit_grad(b_q, b_g, b_k, b_v, b_lse, b_delta, m_t, scale, PREC)
                b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC) * scale
        store_rows(dq + i_head * S * N * D, b_pair, m_q, D, b_dq, D, BD)
    if KEYS:
        o_part = (i_head * SEGMENTS + i_s) * K + o_k
        store_rows(part, o_part, m_k, D, tl.trans(b_dk) * scale, D, BD)
        store_rows(part_v, o_part, m_k, DV, tl.trans(b_dv), DV, BDV)


@triton.jit
def shared_grad_kernel(
    grad, q, out, lse, delta, r, value, part_r, part_u, stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn,
    H, N, PARTS, shared_scale,
    MT: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BM: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`delta = dO . O` of ROWS queries, and over them the gradients of landmarks as keys (`part_r`) and of their values (`part_u`)."""
    i_s, i_rest = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    i_m, i_bh = i_rest % MT, i_rest // MT
    i_head = i_bh.to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    p_q = q + head_offset(i_bh, H, 1, stride_qb, stride_qh)
    p_g = grad + head_offset(i_bh, H, 1, stride_gb, stride_gh)
    b_r = load_rows(r + i_head * M * D, o_m, m_m, D, D, BD)
    b_u = load_rows(value + i_head * M * DV, o_m, m_m, DV, DV, BDV)
    b_dr = tl.zeros([BD, BM], tl.float32)
    b_du = tl.zeros([BDV, BM], tl.float32)
    for i in range(i_s * ROWS, tl.minimum(N, (i_s + 1) * ROWS), T):
        o_q = i + tl.arange(0, T)
        m_q = o_q < N
        b_q = load_rows(p_q, o_q, m_q, stride_qn, D, BD)
        b_g = load_rows(p_g, o_q, m_q, stride_gn, DV, BDV)
        b_lse = tl.load(lse + i_head * N + o_q, mask=m_q, other=float("inf"))
        b_o = load_rows(out + i_head * N * DV, o_q, m_q, DV, DV, BDV)
        b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
        tl.store(delta + i_head * N + o_q, b_delta, mask=m_q & (i_m == 0))
        # [T, BM]
        b_p, b_ds = unit_grad(b_q, b_g, b_r, b_u, b_lse, b_delta, m_m, shared_scale, PREC)
        b_du += tl.dot(tl.trans(b_g), b_p.to(b_g.dtype), input_precision=PREC)
        b_dr += tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), input_precision=PREC)
    o_part = (i_bh * PARTS + i_s).to(tl.int64) * M + o_m
    store_rows(part_r, o_part, m_m, D, tl.trans(b_dr) * shared_scale, D, BD)
    store_rows(part_u, o_part, m_m, DV, tl.trans(b_du), DV, BDV)


@triton.jit
def probe_grad_kernel(
    r, k, v, u, u_delta, stat, dk, dv, part, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, SPLITS, BLOCKS, scale,
    KEYS: tl.constexpr, PROBES: tl.constexpr, MT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Backward of the landmark pass over one split of the keys.

    KEYS: a program a key head writes dk and dv, over all landmarks of its G query heads. PROBES: partial dr of one tile of
    landmarks; both at once where one tile holds all landmarks of the key head. `u` is divided by the landmark's softmax sum, so
    that probabilities relative to the maximum serve.
    """
    i_s, i_rest = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    first, last = i_s * BLOCKS // SPLITS, (i_s + 1) * BLOCKS // SPLITS
    HK = H // G
    if KEYS:
        i_tile = 0
        i_kv = i_rest.to(tl.int64)
        i_first = i_kv * G
    else:
        i_tile = i_rest % MT
        i_first = (i_rest // MT).to(tl.int64)
        i_kv = i_first // G
    p_k = k + (i_kv // HK) * stride_kb + (i_kv % HK) * stride_kh
    p_v = v + (i_kv // HK) * stride_vb + (i_kv % HK) * stride_vh
    b_dr = tl.zeros([BM, BD], tl.float32)
    for i_n in range(first, last):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        b_k = load_rows(p_k, o_n, m_n, stride_kn, D, BD)
        b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
        b_dk = tl.zeros([BN, BD], tl.float32)
        b_dv = tl.zeros([BN, BDV], tl.float32)
        for i in range(0, G * MT if KEYS else 1):
            i_head = i_first + i // MT
            o_m = (i_tile + i % MT) * BM + tl.arange(0, BM)
            m_m = o_m < M
            b_r = load_rows(r + i_head * M * D, o_m, m_m, D, D, BD)
            b_u = load_rows(u + i_head * M * DV, o_m, m_m, DV, DV, BDV)
            b_max = tl.load(stat + (i_head * M + o_m) * 2, mask=m_m, other=float("inf"))
            b_ud = tl.load(u_delta + i_head * M + o_m, mask=m_m, other=0.0)
            # [BN, BM]
            b_s = tl.dot(b_k, tl.trans(b_r), input_precision=PREC) * (scale * LOG2E)
            b_p = tl.where(m_n[:, None], tl.exp2(b_s - b_max[None, :]), 0.0)
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_u), input_precision=PREC) - b_ud[None, :])
            if KEYS:
                b_dv += tl.dot(b_p.to(b_u.dtype), b_u, input_precision=PREC)
                b_dk += tl.dot(b_ds.to(b_r.dtype), b_r, input_precision=PREC)
            if PROBES:
                b_dr += tl.dot(tl.trans(b_ds.to(b_k.dtype)), b_k, input_precision=PREC)
        if KEYS:
            store_rows(dk + i_kv * N * D, o_n, m_n, D, b_dk * scale, D, BD)
            store_rows(dv + i_kv * N * DV, o_n, m_n, DV, b_dv, DV, BDV)
    if PROBES:
        o_m = i_tile * BM + tl.arange(0, BM)
        store_rows(part, (i_first * SPLITS + i_s) * M + o_m, o_m < M, D, b_dr * scale, D, BD)


@triton.jit
def routed_grad_kernel(
    grad, q, k, v, lse, delta, index, order, segment, part, part_v,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, SEGMENTS, MOST, scale,
    K: tl.constexpr, S: tl.constexpr, KT: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of an expert's keys and values over a segment of the expert's pairs, where its keys take several tiles."""
    i_k, i_rest = tl.program_id(0) % KT, tl.program_id(0) // KT
    i_s, i_bh = i_rest % SEGMENTS, i_rest // SEGMENTS
    i_head = i_bh.to(tl.int64)
    i_e, first, last = segment_of(segment, i_head * MOST + i_s)
    if first >= last:
        return
    p_q = q + head_offset(i_bh, H, 1, stride_qb, stride_qh)
    p_g = grad + head_offset(i_bh, H, 1, stride_gb, stride_gh)
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < K
    b_j = tl.load(index + (i_head * M + i_e) * K + o_k, mask=m_k, other=0)
    b_k = load_rows(k + head_offset(i_bh, H, G, stride_kb, stride_kh), b_j, m_k, stride_kn, D, BD)
    b_v = load_rows(v + head_offset(i_bh, H, G, stride_vb, stride_vh), b_j, m_k, stride_vn, DV, BDV)
    b_dk = tl.zeros([BD, BK], tl.float32)
    b_dv = tl.zeros([BDV, BK], tl.float32)
    for i in range(first, last, T):
        o_p = i + tl.arange(0, T)
        m_q = o_p < last
        b_pair = tl.load(order + i_head * S * N + o_p, mask=m_q, other=0)
        o_q = b_pair % N if S > 1 else b_pair
        b_q = load_rows(p_q, o_q, m_q, stride_qn, D, BD)
        b_g = load_rows(p_g, o_q, m_q, stride_gn, DV, BDV)
        b_lse = tl.load(lse + i_head * N + o_q, mask=m_q, other=float("inf"))
        b_delta = tl.load(delta + i_head * N + o_q, mask=m_q, other=0.0)
        # [T, BK]
        b_p, b_ds = unit_grad(b_q, b_g, b_k, b_v, b_lse, b_delta, m_k, scale, PREC)
        b_dv += tl.dot(tl.trans(b_g), b_p.to(b_g.dtype), input_precision=PREC)
        b_dk += tl.dot(tl.trans(b_q), b_ds.to(b_q.dtype), input_precision=PREC)
    o_part = (i_head * SEGMENTS + i_s) * K + o_k
    store_rows(part, o_part, m_k, D, tl.trans(b_dk) * scale, D, BD)
    store_rows(part_v, o_part, m_k, DV, tl.trans(b_dv), DV, BDV)
