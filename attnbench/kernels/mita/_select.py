"""The kernel that merges the landmark pass and selects, for every landmark, the K keys with the largest scores.

The search is exact and has up to three levels: every key of the top K lies in one of the K chunks with the largest maxima, and
every such chunk in one of the K groups of chunks with the largest maxima. Each level is a search for the K-th largest value in
registers, bit by bit, and a prefix sum that compacts what was kept; ties go to the earlier position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._tile import head_offset, load_rows


@triton.jit
def sortable(b_x):
    """float32 -> uint32 in the same order, at least 1; NaN counts as -inf."""
    b_x = tl.where(b_x == b_x, b_x, float("-inf"))
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_sign = b_x.to(tl.int32, bitcast=True) < 0
    return tl.where(b_sign, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)


@triton.jit
def keep_top(b_x, K):
    """Mask of the K largest of `b_x: [L]` (uint32, L <= 32768), and the place of each in a list of them."""
    low = tl.sum(tl.zeros_like(b_x), 0)
    n_low = tl.sum((b_x >= low).to(tl.int32), 0)
    bit = low + 0x80000000
    # until just K are left or the K-th value is known
    while (n_low != K) & (bit != 0):
        trial = low | bit
        count = tl.sum((b_x >= trial).to(tl.int32), 0)
        n_low = tl.where(count >= K, count, n_low)
        low = tl.where(count >= K, trial, low)
        bit = bit >> 1
    b_above = b_x > low
    b_tie = b_x == low
    # the two counts of one prefix sum: above in the low half, ties in the high half
    b_count = tl.cumsum(b_above.to(tl.int32) + (b_tie.to(tl.int32) << 16), 0)
    n_above = tl.sum(b_above.to(tl.int32), 0)
    b_rank = b_count >> 16
    b_keep = b_above | (b_tie & (b_rank <= K - n_above))
    b_place = tl.where(b_above, (b_count & 0xFFFF) - 1, n_above + b_rank - 1)
    return b_keep, b_place


@triton.jit
def select_kernel(
    r, k, chunk_max, part_acc, part_max, part_sum, value, stat, index, list_, score,
    stride_kb, stride_kh, stride_kn, H, N, SPLITS, CHUNKS, GROUPS,
    G: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, PG: tl.constexpr, BG: tl.constexpr, KP: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One program a (head, landmark). PG chunks a group, chunk c in group c % GROUPS; scratch `list_` and `score` a row."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(0) // M
    if SHARED:
        o_s = tl.arange(0, BS)
        o_d = tl.arange(0, BDV)
        o_first = i_bh.to(tl.int64) * SPLITS * M + i_row % M
        b_max = tl.full([BS], float("-inf"), tl.float32)
        for start in range(0, SPLITS, BS):
            m_s = start + o_s < SPLITS
            b_max = tl.maximum(b_max, tl.load(part_max + o_first + (start + o_s) * M, mask=m_s, other=float("-inf")))
        top = tl.max(b_max, 0)
        b_sum = tl.zeros([BS], tl.float32)
        b_acc = tl.zeros([BS, BDV], tl.float32)
        for start in range(0, SPLITS, BS):
            m_s = start + o_s < SPLITS
            o_part = o_first + (start + o_s) * M
            b_w = tl.exp2(tl.load(part_max + o_part, mask=m_s, other=float("-inf")) - top)
            b_sum += b_w * tl.load(part_sum + o_part, mask=m_s, other=0.0)
            b_acc += b_w[:, None] * load_rows(part_acc, o_part, m_s, DV, DV, BDV)
        total = tl.sum(b_sum, 0)
        b_value = tl.sum(b_acc, 0) / total
        tl.store(value + i_row * DV + o_d, b_value.to(value.dtype.element_ty), mask=o_d < DV)
        tl.store(stat + i_row * 2, top)
        tl.store(stat + i_row * 2 + 1, total)
    if ROUTED:
        PER: tl.constexpr = BN // C
        p_max = chunk_max + i_row * CHUNKS
        p_list = list_ + i_row * KP
        p_score = score + i_row * (KP * C)
        # level 1: groups of chunks
        o_g = tl.arange(0, BG)
        m_g = o_g < GROUPS
        b_top = tl.full([BG], float("-inf"), tl.float32)
        for i in range(PG):
            o_c = o_g + i * GROUPS
            b_top = tl.maximum(b_top, tl.load(p_max + o_c, mask=m_g & (o_c < CHUNKS), other=float("-inf")))
        # the first key of a chunk; one that starts past the end holds none
        b_at = (o_g // PER) * BN + o_g % PER
        if PG == 1:
            m_g = m_g & (b_at < N)
        b_x = tl.where(m_g, sortable(b_top), 0)
        n_list = tl.minimum(K, GROUPS)
        b_keep, b_place = keep_top(b_x, n_list)
        tl.store(p_list + b_place, b_at if PG == 1 else o_g, mask=b_keep)
        tl.debug_barrier()
        if PG > 1:
            # level 2: the chunks of those groups
            o_p = tl.arange(0, KP * PG)
            b_c = tl.load(p_list + o_p // PG, mask=o_p // PG < n_list, other=0) + (o_p % PG) * GROUPS
            m_c = (o_p // PG < n_list) & (b_c < CHUNKS)
            b_x = sortable(tl.load(p_max + b_c, mask=m_c, other=float("-inf")))
            b_from = (b_c // PER) * BN + b_c % PER
            m_c = m_c & (b_from < N)
            tl.debug_barrier()
            n_list = tl.minimum(K, n_list * PG)
            b_keep, b_place = keep_top(tl.where(m_c, b_x, 0), n_list)
            tl.store(p_list + b_place, tl.where(m_c, b_from, N), mask=b_keep)
            tl.debug_barrier()
        # level 3: the keys of those chunks
        # the landmark is one column of a product on tensor cores
        o_d, o_one = tl.arange(0, BD), tl.arange(0, 8)[None, :] == 0
        b_r = tl.load(r + i_row * D + o_d, mask=o_d < D, other=0.0)
        b_r = tl.where(o_one, b_r[:, None], 0.0).to(r.dtype.element_ty)
        p_k = k + head_offset(i_bh, H, G, stride_kb, stride_kh)
        for start in range(0, KP * C, BC):
            o_i = start + tl.arange(0, BC)
            b_row = tl.load(p_list + o_i // C, mask=o_i // C < n_list, other=0) + (o_i % C) * PER
            # what lies past the end is read from the last key, and not used
            p_row = p_k + tl.minimum(b_row, N - 1).to(tl.int64)[:, None] * stride_kn + o_d[None, :]
            b_k = tl.load(p_row) if D == BD else tl.load(p_row, mask=(o_d < D)[None, :], other=0.0)
            b_s = tl.dot(b_k, b_r, input_precision=PREC)
            tl.store(p_score + o_i, tl.sum(tl.where(o_one, b_s, 0.0), 1), mask=o_i < KP * C)
        tl.debug_barrier()
        o_j = tl.arange(0, KP * C)
        m_j = o_j // C < n_list
        b_j = tl.load(p_list + o_j // C, mask=m_j, other=0) + (o_j % C) * PER
        b_score = tl.where(m_j & (b_j < N), sortable(tl.load(p_score + o_j)), 0)
        tl.debug_barrier()
        b_keep, b_place = keep_top(b_score, K)
        tl.store(p_list + b_place, b_j, mask=b_keep)
        tl.debug_barrier()
        o_k = tl.arange(0, KP)
        b_key = tl.sort(tl.load(p_list + o_k, mask=o_k < K, other=2147483647))
        tl.store(index + i_row * K + o_k, b_key, mask=o_k < K)
