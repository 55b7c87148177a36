"""The K keys with the largest scores for every query, in Triton, without the N x M scores in memory.

Scores are `q . k` (`select_topk`), or those of an indexer of several heads, `sum_j gate_j ReLU(q_j . k)` (`select_indexed`). Exact: every
key of the top K lies in one of the K chunks of C keys whose largest scores are largest, and every such chunk in one of the K blocks
likewise. One kernel multiplies tiles of queries and keys and keeps the maximum of each chunk and of each block; the other, one program a
query, finds the K blocks, then the K chunks in them, computes the scores of their K C keys again and keeps the K largest; where there are
no more than K blocks, or chunks, none is searched for, and with few chunks the first kernel is not needed. Each search
is for the K-th largest value, bit by bit, and a prefix sum that compacts what is kept in order. Scores are float32; ties go to the
earlier key; NaN counts as the smallest. A causal query reads the keys at or before its position; where it sees fewer than K it reads
them all.

Work of a head: `2 N M D` FLOP for the maxima, `2 N K C D` for the scores again. Bytes that cross memory: q once, k from cache for
each tile of queries, `4 N M (1 / C + 1 / BN)` written and, of that, `4 N (M / BN + K BN / C)` read, and `2 N K C D` of k gathered, which
stay in cache while k fits it. Maxima exist for a slab of queries at a time, within SLAB_BYTES.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power, unit_rows
from ._tile import load_rows

__all__ = ["select_indexed", "select_topk", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_KEYS, MOST_DIM = 256, 128
SLAB_BYTES = 1 << 30
"""bytes of the maxima that exist at a time"""
BATCH = 4096
"""numbers of keys that are scored again at a time"""


@triton.jit
def sortable(b_x):
    """float32 -> uint32 in the same order, at least 1; NaN counts as -inf and -0 as 0."""
    b_x = tl.where(b_x == b_x, b_x, float("-inf"))
    b_x = tl.where(b_x == 0.0, 0.0, b_x)
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_sign = b_x.to(tl.int32, bitcast=True) < 0
    return tl.where(b_sign, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)


@triton.jit
def keep_top(b_x, K):
    """Mask of the K largest of `b_x: [L]` (uint32, L <= 16384; the earlier of equal ones), and their places in a list in order."""
    low = tl.sum(tl.zeros_like(b_x), 0)
    bit = low + 0x80000000
    for _ in range(32):
        trial = low | bit
        count = tl.sum((b_x >= trial).to(tl.int32), 0)
        low = tl.where(count >= K, trial, low)
        bit = bit >> 1
    b_above = b_x > low
    b_tie = b_x == low
    spare = K - tl.sum(b_above.to(tl.int32), 0)
    # the two counts of one prefix sum: above in the low half, ties in the high half
    b_count = tl.cumsum(b_above.to(tl.int32) + (b_tie.to(tl.int32) << 16), 0)
    b_rank = b_count >> 16
    b_keep = b_above | (b_tie & (b_rank <= spare))
    return b_keep, (b_count & 0xFFFF) + tl.minimum(b_rank, spare) - 1


@triton.jit
def topk_score_kernel(
    q, gate, k, chunk_top, block_top,
    stride_qb, stride_qh, stride_qj, stride_qn, stride_kb, stride_kh, stride_kn,
    H, N, M, first_row, R, TILES, SPLITS, BLOCKS,
    G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Maxima of chunks and blocks of keys, for a tile of a slab's R queries and a split of the keys. J heads of an indexer, 0 for none."""
    i_s, i_rest = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    i_t, i_bh = i_rest % TILES, i_rest // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_r = i_t * BQ + tl.arange(0, BQ)
    o_q = first_row + o_r
    m_q = (o_r < R) & (o_q < N)
    blocks = BLOCKS
    if CAUSAL:
        blocks = tl.minimum(BLOCKS, (first_row + i_t * BQ + BQ - 1) // BN + 1)
    PER: tl.constexpr = BN // C
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k = k + i_b * stride_kb + i_h // G * stride_kh
    o_row = i_bh.to(tl.int64) * R + o_r
    if J == 0:
        # [BQ, BD]
        b_q = load_rows(p_q, o_q, m_q, stride_qn, D, BD)
    for i_n in range(i_s * blocks // SPLITS, (i_s + 1) * blocks // SPLITS):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < M
        # [BN, BD]
        b_k = load_rows(p_k, o_n, m_n, stride_kn, D, BD)
        if J == 0:
            # [BQ, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)
        else:
            b_s = tl.zeros([BQ, BN], tl.float32)
            for j in range(J):
                b_j = load_rows(p_q + j * stride_qj, o_q, m_q, stride_qn, D, BD)
                b_g = tl.load(gate + (i_b * J + j) * N + o_q, mask=m_q, other=0.0)
                b_s += b_g[:, None] * tl.maximum(tl.dot(b_j, tl.trans(b_k), input_precision=PREC), 0.0)
        m_s = m_n[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= o_q[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        # [BQ, PER]
        b_top = tl.max(tl.reshape(b_s, [BQ, PER, C]), 2)
        o_c = i_n * PER + tl.arange(0, PER)
        tl.store(chunk_top + o_row[:, None] * (BLOCKS * PER) + o_c[None, :], b_top, mask=m_q[:, None])
        tl.store(block_top + o_row * BLOCKS + i_n, tl.max(b_top, 1), mask=m_q)


@triton.jit
def topk_select_kernel(
    q, gate, k, chunk_top, block_top, index, score,
    stride_qb, stride_qh, stride_qj, stride_qn, stride_kb, stride_kh, stride_kn,
    H, N, M, first_row, R, BLOCKS,
    G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, KC: tl.constexpr, KP: tl.constexpr, BB: tl.constexpr, LB: tl.constexpr, BC: tl.constexpr, LISTED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """The K keys of one query, ascending, then -1; its row of `index` holds the lists of blocks and of chunks on the way.

    LISTED: 2 where blocks and chunks are chosen, 1 where there are no more blocks than K, 0 where there are no more chunks. KC: lanes of
    chunks kept, LB of blocks kept.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = tl.program_id(0) // R, first_row + tl.program_id(0) % R
    if i_q >= N:
        return
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    visible = M
    if CAUSAL:
        visible = tl.minimum(i_q + 1, M)
    PER: tl.constexpr = BN // C
    p_list = index + (i_bh.to(tl.int64) * N + i_q) * K
    if LISTED < 1:  # every block and every chunk is kept
        n_list = (visible + C - 1) // C
    else:
        # level 1: blocks
        n_list = (visible + BN - 1) // BN
        if LISTED == 2:
            o_b = tl.arange(0, BB)
            m_b = o_b * BN < visible
            b_x = sortable(tl.load(block_top + i_row * BLOCKS + o_b, mask=m_b, other=float("-inf")))
            n_list = tl.minimum(K, n_list)
            b_keep, b_place = keep_top(tl.where(m_b, b_x, 0), n_list)
            tl.store(p_list + b_place, o_b, mask=b_keep)
            tl.debug_barrier()
        # level 2: the chunks of those blocks
        o_c = tl.arange(0, LB * PER)
        m_c = o_c // PER < n_list
        b_c = o_c
        if LISTED == 2:
            b_c = tl.load(p_list + o_c // PER, mask=m_c, other=0) * PER + o_c % PER
        m_c = m_c & (b_c * C < visible)
        b_x = sortable(tl.load(chunk_top + i_row * (BLOCKS * PER) + b_c, mask=m_c, other=float("-inf")))
        n_list = tl.minimum(K, tl.sum(m_c.to(tl.int32), 0))
        b_keep, b_place = keep_top(tl.where(m_c, b_x, 0), n_list)
        tl.debug_barrier()
        tl.store(p_list + b_place, b_c, mask=b_keep)
        tl.debug_barrier()
    # level 3: the keys of those chunks
    o_d = tl.arange(0, BD)
    p_q = q + i_b * stride_qb + i_h * stride_qh + i_q.to(tl.int64) * stride_qn + o_d
    p_k = k + i_b * stride_kb + i_h // G * stride_kh
    p_score = score + i_row * (KC * C)
    for start in range(0, n_list * C, BC):
        o_i = start + tl.arange(0, BC)
        m_i = o_i // C < n_list
        b_key = o_i
        if LISTED > 0:
            b_key = tl.load(p_list + o_i // C, mask=m_i, other=0) * C + o_i % C
        # [BC, BD]
        b_k = load_rows(p_k, b_key, m_i & (b_key < visible), stride_kn, D, BD).to(tl.float32)
        if J == 0:
            b_q = tl.load(p_q, mask=o_d < D, other=0.0).to(tl.float32)
            b_s = tl.sum(b_k * b_q[None, :], 1)
        else:
            b_s = tl.zeros([BC], tl.float32)
            for j in range(J):
                b_q = tl.load(p_q + j * stride_qj, mask=o_d < D, other=0.0).to(tl.float32)
                b_s += tl.load(gate + (i_b * J + j) * N + i_q) * tl.maximum(tl.sum(b_k * b_q[None, :], 1), 0.0)
        tl.store(p_score + o_i, b_s, mask=m_i)
    tl.debug_barrier()
    o_j = tl.arange(0, KC * C)
    m_j = o_j // C < n_list
    b_key = o_j
    if LISTED > 0:
        b_key = tl.load(p_list + o_j // C, mask=m_j, other=0) * C + o_j % C
    m_j = m_j & (b_key < visible)
    b_x = sortable(tl.load(p_score + o_j, mask=m_j, other=float("-inf")))
    n_list = tl.minimum(K, tl.sum(m_j.to(tl.int32), 0))
    b_keep, b_place = keep_top(tl.where(m_j, b_x, 0), n_list)
    tl.debug_barrier()
    tl.store(p_list + b_place, b_key, mask=b_keep)
    o_k = tl.arange(0, KP)
    tl.store(p_list + o_k, tl.full([KP], -1, tl.int32), mask=(o_k >= n_list) & (o_k < K))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _chunk(keys: int, topk: int) -> int:
    """Keys a chunk, where writing the maxima of `keys / C` chunks costs about as much as scoring `K C` keys again."""
    return 2 ** min(4, max(2, round(log2((keys / (24 * topk)) ** 0.5))))


def _warps(lanes: int) -> int:
    """Of a program that searches among so many values."""
    return 8 if lanes > 4096 else 2 if lanes > 1024 else 1


def supported(dim: int, keys: int, topk: int, dtype: torch.dtype) -> list[str]:
    """Why such a selection cannot be run; empty means it can."""
    checks = (
        (dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"),
        (not 1 <= dim <= MOST_DIM, f"takes head dimensions up to {MOST_DIM}, not {dim}"),
        (not 1 <= min(topk, keys) <= MOST_KEYS, f"takes 1 to {MOST_KEYS} keys a query, not {topk}"),
        (keys > 1 << 20, f"takes up to {1 << 20} keys, not {keys}"),
    )
    return [reason for fails, reason in checks if fails]


def select_topk(q: Tensor, k: Tensor, topk: int, *, causal: bool = False) -> Tensor:
    """Keys `[B, H, N, K]` (int32, ascending, -1 where a causal query sees fewer) with the largest `q . k`.

    `q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `K = min(topk, M)`. Raises ValueError where the call is not supported.
    """
    _check(q, k, topk)
    return topk_select(unit_rows(q.detach()), q.new_empty(0), unit_rows(k.detach()), topk, 0, causal)


def select_indexed(q: Tensor, gate: Tensor, k: Tensor, topk: int, *, causal: bool = False) -> Tensor:
    """Keys `[B, 1, N, K]` likewise, with the largest `sum_j gate_j ReLU(q_j . k)`.

    `q: [B, J, N, D]` and `gate: [B, J, N]` of the J heads of an indexer, `k: [B, 1, M, D]`.
    """
    _check(q, k, topk)
    return topk_select(unit_rows(q.detach()), gate.detach().float().contiguous(), unit_rows(k.detach()), topk, q.shape[1], causal)


def _check(q: Tensor, k: Tensor, topk: int) -> None:
    reasons = supported(q.shape[3], k.shape[2], topk, q.dtype)
    if q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        reasons.append(f"q {list(q.shape)} of {q.dtype} and k {list(k.shape)} of {k.dtype} do not fit")
    if reasons:
        raise ValueError("; ".join(reasons))


@define("topk_select")
def topk_select(q: Tensor, gate: Tensor, k: Tensor, topk: int, indexer: int, causal: bool) -> Tensor:
    """`select_topk`, or with `indexer` heads `select_indexed`."""
    (b, h, n, d), m = q.shape, k.shape[2]
    heads, groups = (1, 1) if indexer else (h, h // k.shape[1])
    top, fp32 = min(topk, m), q.dtype == torch.float32
    block, width = 64 if fp32 or d > 64 else 128, max(16, power(d))
    chunk, blocks, tile = _chunk(m, top), -(-m // block), 64
    listed = 2 if blocks > top else int(-(-m // chunk) > top)
    kept_blocks, kept = (min(power(top), power(-(-m // size))) for size in (block, chunk))
    int_, float_ = {"dtype": torch.int32, "device": q.device}, {"dtype": torch.float32, "device": q.device}
    index = torch.empty(b, heads, n, top, **int_)
    sizes = blocks * block // chunk if listed else 0, blocks if listed else 0, kept * chunk
    rows = min(-(-n // tile) * tile, max(tile, SLAB_BYTES // (4 * b * heads * sum(sizes)) // tile * tile))
    chunk_top, block_top, score = (torch.empty(b * heads * rows, size, **float_) for size in sizes)
    stride_q = (q.stride(0), 0, q.stride(1), q.stride(2)) if indexer else (q.stride(0), q.stride(1), 0, q.stride(2))
    tiles, common = rows // tile, {"G": groups, "J": indexer, "D": d, "BD": width, "C": chunk, "BN": block, "CAUSAL": causal}
    splits = min(blocks, max(1, 4 * _processors(q.device) // (b * heads * tiles)))
    widest = max(kept * chunk, power(blocks) if listed == 2 else 0, kept_blocks * (block // chunk) if listed else 0)
    with on_device(q):
        for first in range(0, n, rows):
            if listed:
                topk_score_kernel[(b * heads * tiles * splits,)](
                    q, gate, k, chunk_top, block_top, *stride_q, *k.stride()[:3], heads, n, m, first, rows, tiles, splits, blocks,
                    BQ=tile, PREC="tf32x3" if fp32 else "tf32", **common, num_warps=4, num_stages=3 if block == 128 else 2,
                )  # fmt: skip
            topk_select_kernel[(b * heads * rows,)](
                q, gate, k, chunk_top, block_top, index, score, *stride_q, *k.stride()[:3], heads, n, m, first, rows, blocks,
                K=top, KC=kept, KP=power(top), BB=power(blocks), LB=kept_blocks, BC=min(BATCH // width, kept * chunk),
                LISTED=listed, **common, num_warps=_warps(widest),
            )  # fmt: skip
    return index


@torch.library.register_fake(topk_select)
def _(q: Tensor, gate: Tensor, k: Tensor, topk: int, indexer: int, causal: bool) -> Tensor:
    return q.new_empty(q.shape[0], 1 if indexer else q.shape[1], q.shape[2], min(topk, k.shape[2]), dtype=torch.int32)
