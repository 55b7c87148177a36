"""Attention to compressed keys in Triton, forward and backward, and the choice of blocks of tokens by its probabilities, as in NSA.

Compressed key b stands for the tokens `b stride` to `b stride + length - 1`; a causal query reads it once its last token is not in the
future. Importance of a block of `block` tokens for a group of heads that share a key head: the sum of their probabilities, each
compressed key counted as often as its strides and the block's meet. Each query keeps the K blocks of largest importance; ties go to the
earlier block. The choice carries no gradient.

One kernel attends as flash attention does, with a staircase for a mask; one multiplies queries and compressed keys again, and adds
probabilities up to importances; one, a program a query, keeps the largest. Work of one head, N queries and C compressed keys: `2 N C (D +
Dv)` FLOP to attend and `2 N C D (1 + (length - stride) / block)` again, half of each where causal. Bytes that cross memory: q twice, the
output once, and `8 N E` for importances of E blocks, which exist for a slab of queries at a time, within SLAB_BYTES. Kept for the backward
pass: log-sum-exps and the output's rounding errors. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power, unit_rows
from ._tile import LOG2E, load_rows, store_rows
from .blocks._keys import delta_kernel
from .blocks._tile import attend, finish, score_gradient, store_output
from .topk import keep_top, sortable

__all__ = ["Selection", "attend_compressed", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM, MOST_BLOCKS = 128, 16384
SLAB_BYTES = 1 << 30
"""bytes of the importances that exist at a time"""
PROGRAMS = 512
"""programs, at least, that sums over queries are split among"""


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


@triton.jit
def compressed_attend_kernel(
    q, k, v, out, low, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, LOW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs and base-2 log-sum-exps of T queries."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_n = i_t * T + tl.arange(0, T)
    m_n = o_n < N
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    # [T, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD)
    b_max = tl.full([T], float("-inf"), tl.float32)
    b_sum = tl.zeros([T], tl.float32)
    b_acc = tl.zeros([T, BDV], tl.float32)
    for i in range(0, visible(tl.minimum(N, i_t * T + T) - 1, C, STRIDE, LENGTH, CAUSAL), BK):
        o_c = i + tl.arange(0, BK)
        b_k, b_v = load_rows(p_k, o_c, o_c < C, stride_kn, D, BD), load_rows(p_v, o_c, o_c < C, stride_vn, DV, BDV)
        m_s = stairs(o_n, o_c, C, STRIDE, LENGTH, CAUSAL)
        b_max, b_sum, b_acc = attend(b_q, b_k, b_v, m_s, scale * LOG2E, b_max, b_sum, b_acc, PREC)
    i_row = i_bh.to(tl.int64) * N
    b_out, b_lse = finish(b_max, b_sum, b_acc)
    store_output(out + i_row * DV, low + i_row * DV, o_n, m_n, b_out, LOW, DV, BDV)
    tl.store(lse + i_row + o_n, b_lse, mask=m_n)


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


@triton.jit
def compressed_query_gradient_kernel(
    grad, q, k, v, lse, delta, dq,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of T queries."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h, i_row = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64), i_bh.to(tl.int64) * N
    o_n = i_t * T + tl.arange(0, T)
    m_n = o_n < N
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    # [T, BD], [T, BDV]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_n, m_n, stride_qn, D, BD)
    b_g = load_rows(grad + i_b * stride_gb + i_h * stride_gh, o_n, m_n, stride_gn, DV, BDV)
    b_lse = tl.load(lse + i_row + o_n, mask=m_n, other=float("inf"))
    b_delta = tl.load(delta + i_row + o_n, mask=m_n, other=0.0)
    b_dq = tl.zeros([T, BD], tl.float32)
    for i in range(0, visible(tl.minimum(N, i_t * T + T) - 1, C, STRIDE, LENGTH, CAUSAL), BK):
        o_c = i + tl.arange(0, BK)
        b_k, b_v = load_rows(p_k, o_c, o_c < C, stride_kn, D, BD), load_rows(p_v, o_c, o_c < C, stride_vn, DV, BDV)
        m_s = stairs(o_n, o_c, C, STRIDE, LENGTH, CAUSAL)
        b_ds = score_gradient(b_q, b_k, b_g, b_v, m_s, scale * LOG2E, b_lse, b_delta, PREC)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC)
    store_rows(dq + i_row * D, o_n, m_n, D, b_dq * scale, D, BD)


@triton.jit
def compressed_key_gradient_kernel(
    grad, q, k, v, lse, delta, part_k, part_v,
    stride_gb, stride_gh, stride_gn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, C, TILES, SPLITS, scale,
    G: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BK compressed keys and values over one split of the queries of their group of heads."""
    i_j, i_rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_s, i_kv = i_rest % SPLITS, (i_rest // SPLITS).to(tl.int64)
    HK = H // G
    i_b, i_hk = i_kv // HK, i_kv % HK
    o_c = i_j * BK + tl.arange(0, BK)
    # [BK, BD], [BK, BDV]
    b_k = load_rows(k + i_b * stride_kb + i_hk * stride_kh, o_c, o_c < C, stride_kn, D, BD)
    b_v = load_rows(v + i_b * stride_vb + i_hk * stride_vh, o_c, o_c < C, stride_vn, DV, BDV)
    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BDV], tl.float32)
    tiles = (N + T - 1) // T
    begin = 0
    if CAUSAL:  # the first query that reads any of these keys
        begin = tl.minimum(tiles, (i_j * BK * STRIDE + LENGTH - 1) // T)
    tiles -= begin
    for i_g in range(G):
        i_h = i_hk * G + i_g
        p_q, p_g = q + i_b * stride_qb + i_h * stride_qh, grad + i_b * stride_gb + i_h * stride_gh
        i_row = (i_b * H + i_h) * N
        for i in range(begin + i_s * tiles // SPLITS, begin + (i_s + 1) * tiles // SPLITS):
            o_n = i * T + tl.arange(0, T)
            m_n = o_n < N
            # [T, BD], [T, BDV]
            b_q, b_g = load_rows(p_q, o_n, m_n, stride_qn, D, BD), load_rows(p_g, o_n, m_n, stride_gn, DV, BDV)
            b_lse = tl.load(lse + i_row + o_n, mask=m_n, other=float("inf"))
            b_delta = tl.load(delta + i_row + o_n, mask=m_n, other=0.0)
            m_s = (o_c < C)[:, None]
            if CAUSAL:
                m_s = m_s & ((o_c * STRIDE + (LENGTH - 1))[:, None] <= o_n[None, :])
            # [BK, T]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PREC) * (scale * LOG2E)
            b_p = tl.where(m_s, tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_g.dtype), b_g, input_precision=PREC)
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_g), input_precision=PREC) - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PREC)
    i_part = (i_kv * SPLITS + i_s) * C
    store_rows(part_k + i_part * D, o_c, o_c < C, D, b_dk * scale, D, BD)
    store_rows(part_v + i_part * DV, o_c, o_c < C, DV, b_dv, DV, BDV)


class Selection(NamedTuple):
    """What is compressed, and how blocks of tokens are chosen."""

    keys: int
    """tokens"""
    length: int
    """tokens of a compressed key"""
    stride: int
    """tokens from one compressed key to the next; divides length and block"""
    block: int
    """tokens of a block, at least `length`"""
    topk: int
    """blocks that each query keeps; all where there are fewer"""
    first: int
    """first blocks that are always kept"""
    local: int
    """blocks that are always kept: the query's own and those before it"""
    causal: bool

    @property
    def blocks(self) -> int:
        """E."""
        return -(-self.keys // self.block)


def supported(q: Tensor, k: Tensor, v: Tensor, s: Selection) -> list[str]:
    """Why these tensors cannot be run; empty means they can. Reads shapes and dtypes only."""
    d, dv = q.shape[3], v.shape[3]
    checks = (
        (q.dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"),
        (not q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype"),
        (max(d, dv) > MOST_DIM, f"takes head dimensions up to {MOST_DIM}, not {max(d, dv)}"),
        (k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or k.shape[3] != d, "q, k, v do not fit [B, H, N, D]"),
        (q.shape[1] % k.shape[1] != 0, f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads"),
        (bool(s.length % s.stride or s.block % s.stride) or s.length > s.block, "the stride must divide length and block, length <= block"),
        (k.shape[2] > s.blocks * (s.block // s.stride), f"{k.shape[2]} compressed keys are more than {s.keys} tokens have"),
        (s.blocks > MOST_BLOCKS, f"takes up to {MOST_BLOCKS} blocks, not {s.blocks}"),
    )
    return [reason for fails, reason in checks if fails]


def attend_compressed(q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q [B, H, N, D]` to compressed `k [B, Hkv, C, D]`, `v [B, Hkv, C, Dv]`, and the blocks that it chooses.

    Returns `[B, H, N, Dv]`, 0 where a query reads nothing, and `[B, Hkv, N, min(K, E)]` int32, ascending, then -1. `scale` defaults to
    `D ** -0.5`. Raises ValueError where the call is not supported.
    """
    if reasons := supported(q, k, v, selection):
        raise ValueError("; ".join(reasons))
    out, _, _, chosen = compressed_forward(q, k, v, [int(x) for x in selection], scale or q.shape[-1] ** -0.5)
    return out, chosen


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Any], int]:
    """Constants of every kernel that attends, and warps."""
    d, dv, fp32 = q.shape[3], v.shape[3], q.dtype == torch.float32
    dim, dim_v = max(16, power(d)), max(16, power(dv))
    big = max(dim, dim_v) > 64
    sizes = {"G": q.shape[1] // k.shape[1], "D": d, "DV": dv, "T": 32 if fp32 else 64, "BK": 32 if fp32 else 64, "BD": dim, "BDV": dim_v,
             "PREC": "tf32x3" if fp32 else "tf32"}  # fmt: skip
    return sizes, 8 if big and not fp32 else 4


def _choose(q: Tensor, k: Tensor, lse: Tensor, s: Selection, scale: float) -> Tensor:
    """Chosen blocks, a slab of queries after the other."""
    (b, h, n, d), hk, blocks = q.shape, k.shape[1], s.blocks
    sizes, warps = _sizes(q, k, k)
    tile, part, width = sizes["T"], min(64, max(16, power(blocks))), max(16, power(blocks))
    slots = min(s.topk, blocks)
    chosen = torch.empty(b, hk, n, slots, dtype=torch.int32, device=q.device)
    slab = min(-(-n // tile), max(1, SLAB_BYTES // (4 * b * hk * blocks * tile))) * tile
    score = torch.empty(b * hk, slab, blocks, dtype=torch.float32, device=q.device)
    tiles, parts = slab // tile, -(-blocks // part)
    for first_row in range(0, n, slab):
        importance_kernel[(b * hk * tiles * parts,)](
            q, k, lse, score, *q.stride()[:3], *k.stride()[:3], h, n, k.shape[2], blocks, first_row, slab, tiles, parts, scale,
            G=h // hk, STRIDE=s.stride, LENGTH=s.length, BLOCK=s.block, D=d, T=tile, BE=part, BD=sizes["BD"], CAUSAL=bool(s.causal),
            PREC=sizes["PREC"], num_warps=warps, num_stages=2,
        )  # fmt: skip
        block_select_kernel[(b * hk * slab,)](
            score, chosen, n, blocks, first_row, slab, s.first, s.local, BLOCK=s.block, K=slots, KP=max(16, power(slots)), BE=width,
            CAUSAL=bool(s.causal), num_warps=1 if width <= 256 else 4 if width <= 4096 else 8,
        )  # fmt: skip
    return chosen


@define("compressed_forward")
def compressed_forward(q: Tensor, k: Tensor, v: Tensor, selection: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, what rounding took from it, its log-sum-exp, and the chosen blocks."""
    q, k, v, s = unit_rows(q), unit_rows(k), unit_rows(v), Selection(*selection)
    (b, h, n, _), (sizes, warps) = q.shape, _sizes(q, k, v)
    out, lse = q.new_empty(b, h, n, v.shape[3]), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    keeps = q.dtype != torch.float32
    if keeps:  # as many queries as two groups of warps can hold
        sizes, warps = {**sizes, "T": 128}, 8
    low, tiles = torch.empty_like(out) if keeps else out.new_empty(0), -(-n // sizes["T"])
    with on_device(q):
        compressed_attend_kernel[(b * h * tiles,)](
            q, k, v, out, low, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, k.shape[2], tiles, scale,
            STRIDE=s.stride, LENGTH=s.length, CAUSAL=bool(s.causal), LOW=keeps, **sizes, num_warps=warps, num_stages=2,
        )  # fmt: skip
        return out, low, lse, _choose(q, k, lse, s, scale)


@torch.library.register_fake(compressed_forward)
def _(q: Tensor, k: Tensor, v: Tensor, selection: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Selection(*selection)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    low = torch.empty_like(out) if q.dtype != torch.float32 else out.new_empty(0)
    chosen = q.new_empty(q.shape[0], k.shape[1], q.shape[2], min(s.topk, s.blocks), dtype=torch.int32)
    return out, low, q.new_empty(out.shape[:3], dtype=torch.float32), chosen


@define("compressed_backward", final=True)
def compressed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], selection: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad, q, k, v, s = unit_rows(grad), unit_rows(q), unit_rows(k), unit_rows(v), Selection(*selection)
    out, low, lse = saved
    (b, h, n, d), (_, hk, c, _), dv = q.shape, k.shape, v.shape[3]
    sizes, warps = _sizes(q, k, v)
    common = {**sizes, "STRIDE": s.stride, "LENGTH": s.length, "CAUSAL": bool(s.causal), "num_warps": warps, "num_stages": 2}
    delta, dq, tiles = torch.empty_like(lse), q.new_empty(q.shape), -(-n // sizes["T"])
    strides = (*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    key_tiles = -(-c // sizes["BK"])
    splits = max(1, min(tiles, PROGRAMS // (b * hk * key_tiles)))
    part_k, part_v = (torch.empty(b, hk, splits, c, dim, dtype=torch.float32, device=q.device) for dim in (d, dv))
    with on_device(q):
        delta_kernel[(b * h * tiles,)](
            grad, out, low, delta, *grad.stride()[:3], h, n, tiles, DV=dv, BT=sizes["T"], BDV=sizes["BDV"], LOW=low.numel() > 0, num_warps=4
        )
        compressed_query_gradient_kernel[(b * h * tiles,)](grad, q, k, v, lse, delta, dq, *strides, h, n, c, tiles, scale, **common)
        compressed_key_gradient_kernel[(b * hk * splits * key_tiles,)](
            grad, q, k, v, lse, delta, part_k, part_v, *strides, h, n, c, key_tiles, splits, scale, **common
        )
        return dq, part_k.sum(2).to(k.dtype), part_v.sum(2).to(v.dtype)


@torch.library.register_fake(compressed_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], selection: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.setting = inputs
    ctx.save_for_backward(q, k, v, *output[:3])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    q, k, v, *saved = ctx.saved_tensors
    return *compressed_backward(grad, q, k, v, saved, *ctx.setting), None, None


torch.library.register_autograd(compressed_forward, _gradient, setup_context=_save)
