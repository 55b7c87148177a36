"""Spark attention in Triton: keys whose predicted score reaches a threshold, weighted by a softmax times a gate; forward and backward.

`u_ij = q_i[:r] . k_j[:r]`, `T_i = {j : u_ij >= min(limit_i, max_j u_ij)}`,
`o_i = sum_{j in T_i} softmax_{j in T_i}(scale u_ij) softplus(scale_s q_i[r:] . k_j[r:]) v_j`. Every pair is scored, as in flash
attention, and scores below the threshold weigh nothing: where none reaches it, only the largest so far counts, and what counted before
is dropped.
`spark_statistics` gives a causal query's mean score and its sum of squared deviations, merged block by block. Thresholds carry no gradient.

Work of a head: `2 N M (D + Dv)` FLOP forward, `2 N M (6 D + 3 Dv)` backward, in two kernels that each compute the scores again; two
exponentials and a logarithm a pair each time. Bytes: inputs, output and gradients as in flash attention. Kept beside inputs and output:
`8 N` bytes a head, the log-sum-exp and the threshold used. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power, unit_rows
from ._tile import LOG2E, load_rows, store_rows

__all__ = ["spark_attention", "spark_statistics", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 128


@triton.jit
def visible(o_q, o_n, M, CAUSAL: tl.constexpr):
    """`[len(o_q), len(o_n)]`, True where a query sees a key."""
    m_s = (o_n < M)[None, :]
    if CAUSAL:
        m_s = m_s & (o_n[None, :] <= o_q[:, None])
    return m_s


@triton.jit
def gate_of(b_t):
    """`softplus(t)` and its derivative."""
    b_e = tl.exp2(-tl.abs(b_t) * LOG2E)
    b_soft = tl.maximum(b_t, 0.0) + tl.log2(1.0 + b_e) / LOG2E
    return b_soft, tl.where(b_t >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def flag_of(flags, i_bh, N, first):
    """Where the flag of the tile of 64 queries is that holds the one at `first`."""
    return flags + i_bh * ((N + 63) // 64) + first // 64


@triton.jit
def spark_statistics_kernel(
    q, k, mean, squares, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, H, N, M, TILES,
    G: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the scores that a tile of causal queries sees."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    m_q = o_q < N
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, o_q, m_q, stride_qn, R, BR)
    p_k = k + i_b * stride_kb + i_h // G * stride_kh
    b_count = tl.zeros([BQ], tl.float32)
    b_mean = tl.zeros([BQ], tl.float32)
    b_squares = tl.zeros([BQ], tl.float32)
    for start in range(0, tl.minimum(M, (i_t + 1) * BQ), BN):
        o_n = start + tl.arange(0, BN)
        b_k = load_rows(p_k, o_n, o_n < M, stride_kn, R, BR)
        # [BQ, BN]
        b_u = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)
        m_s = visible(o_q, o_n, M, True)
        b_n = tl.sum(m_s.to(tl.float32), 1)
        b_own = tl.sum(tl.where(m_s, b_u, 0.0), 1) / tl.maximum(b_n, 1.0)
        b_apart = tl.where(m_s, b_u - b_own[:, None], 0.0)
        b_total = tl.maximum(b_count + b_n, 1.0)
        b_step = b_own - b_mean
        b_squares += tl.sum(b_apart * b_apart, 1) + b_step * b_step * (b_count * b_n / b_total)
        b_mean += b_step * (b_n / b_total)
        b_count += b_n
    tl.store(mean + i_bh.to(tl.int64) * N + o_q, b_mean, mask=m_q)
    tl.store(squares + i_bh.to(tl.int64) * N + o_q, b_squares, mask=m_q)


@triton.jit
def spark_attend_kernel(
    q, k, v, limit, flags, out, lse, used,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head. R dimensions predict, S gate; `lse` is base 2; `used` is the threshold as lowered.

    With SOME only tiles of 64 queries whose flag is not 0, here and in the other kernels.
    """
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    wanted = 1
    if SOME:
        wanted = tl.load(flag_of(flags, i_bh, N, i_t * BQ))
    if wanted == 0:
        return
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    m_q = o_q < N
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    o_row = i_bh.to(tl.int64) * N + o_q
    # [BQ, BR], [BQ, BS]
    b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
    b_limit = tl.load(limit + o_row, mask=m_q, other=0.0)
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_acc = tl.zeros([BQ, BDV], tl.float32)
    last = M
    if CAUSAL:
        last = tl.minimum(M, (i_t + 1) * BQ)
    for start in range(0, last, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < M
        b_kr = load_rows(p_k, o_n, m_n, stride_kn, R, BR)
        # [BQ, BN]
        b_u = tl.where(visible(o_q, o_n, M, CAUSAL), tl.dot(b_qr, tl.trans(b_kr), input_precision=PREC), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_u, 1))
        b_least = tl.minimum(b_limit, b_new)
        b_p = tl.where((b_u >= b_least[:, None]) & (b_u > float("-inf")), tl.exp2((b_u - b_new[:, None]) * (scale * LOG2E)), 0.0)
        # where nothing reached the threshold before, what counted was the largest then
        b_decay = tl.where((b_max < b_limit) & (b_new > b_max), 0.0, tl.exp2((b_max - b_new) * (scale * LOG2E)))
        b_ks = load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
        b_gate, _ = gate_of(tl.dot(b_qs, tl.trans(b_ks), input_precision=PREC) * scale_s)
        b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_acc = b_acc * b_decay[:, None] + tl.dot((b_p * b_gate).to(b_v.dtype), b_v, input_precision=PREC)
        b_max = b_new
    store_rows(out, o_row, m_q, DV, b_acc / b_sum[:, None], DV, BDV)
    tl.store(lse + o_row, b_max * (scale * LOG2E) + tl.log2(b_sum), mask=m_q)
    tl.store(used + o_row, tl.minimum(b_limit, b_max), mask=m_q)


@triton.jit
def weights_of(
    b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC: tl.constexpr
):  # fmt: skip
    """Softmax weights, gate and the gate's derivative of a tile, `[BQ, BN]` each, computed anew."""
    b_u = tl.dot(b_qr, tl.trans(b_kr), input_precision=PREC)
    b_p = tl.where(m_s & (b_u >= b_limit[:, None]), tl.exp2(b_u * (scale * LOG2E) - b_lse[:, None]), 0.0)
    b_gate, b_slope = gate_of(tl.dot(b_qs, tl.trans(b_ks), input_precision=PREC) * scale_s)
    return b_p, b_gate, b_slope


@triton.jit
def spark_query_gradient_kernel(
    q, k, v, grad, lse, used, delta, flags, dq,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries; `delta` is `grad . out`."""
    i_t, i_bh = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    wanted = 1
    if SOME:
        wanted = tl.load(flag_of(flags, i_bh, N, i_t * BQ))
    if wanted == 0:
        return
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    o_q = i_t * BQ + tl.arange(0, BQ)
    m_q = o_q < N
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    o_row = i_bh.to(tl.int64) * N + o_q
    b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
    b_g = load_rows(grad, o_row, m_q, DV, DV, BDV)
    b_lse, b_limit = tl.load(lse + o_row, mask=m_q, other=0.0), tl.load(used + o_row, mask=m_q, other=0.0)
    b_delta = tl.load(delta + o_row, mask=m_q, other=0.0)
    b_dqr = tl.zeros([BQ, BR], tl.float32)
    b_dqs = tl.zeros([BQ, BS], tl.float32)
    last = M
    if CAUSAL:
        last = tl.minimum(M, (i_t + 1) * BQ)
    for start in range(0, last, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < M
        b_kr, b_ks = load_rows(p_k, o_n, m_n, stride_kn, R, BR), load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
        m_s = visible(o_q, o_n, M, CAUSAL)
        b_p, b_gate, b_slope = weights_of(b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC)
        b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
        b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PREC)
        b_dqs += tl.dot((b_p * b_dw * b_slope).to(b_ks.dtype), b_ks, input_precision=PREC)
        b_dqr += tl.dot((b_p * (b_dw * b_gate - b_delta[:, None])).to(b_kr.dtype), b_kr, input_precision=PREC)
    store_rows(dq, o_row, m_q, R + S, b_dqr * scale, R, BR)
    store_rows(dq + R, o_row, m_q, R + S, b_dqs * scale_s, S, BS)


@triton.jit
def spark_key_gradient_kernel(
    q, k, v, grad, lse, used, delta, flags, some, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, TILES, scale, scale_s,
    G: tl.constexpr, R: tl.constexpr, S: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BDV: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one key head, over the queries of its G heads; with SOME added to what is there, where `some` is 1."""
    wanted = 1
    if SOME:
        wanted = tl.load(some)
    if wanted == 0:
        return
    i_t, i_kv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    heads = H // G
    i_b, i_h = (i_kv // heads).to(tl.int64), (i_kv % heads).to(tl.int64)
    o_n = i_t * BN + tl.arange(0, BN)
    m_n = o_n < M
    p_k, p_v = k + i_b * stride_kb + i_h * stride_kh, v + i_b * stride_vb + i_h * stride_vh
    b_kr, b_ks = load_rows(p_k, o_n, m_n, stride_kn, R, BR), load_rows(p_k + R, o_n, m_n, stride_kn, S, BS)
    b_v = load_rows(p_v, o_n, m_n, stride_vn, DV, BDV)
    b_dkr = tl.zeros([BN, BR], tl.float32)
    b_dks = tl.zeros([BN, BS], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    first = 0
    if CAUSAL:
        first = i_t * BN // BQ * BQ
    for g in range(G):
        i_q = i_h * G + g
        p_q = q + i_b * stride_qb + i_q * stride_qh
        for start in range(first, N, BQ):
            if SOME:
                wanted = tl.load(flag_of(flags, i_b * H + i_q, N, start))
            if wanted != 0:
                o_q = start + tl.arange(0, BQ)
                m_q = o_q < N
                o_row = (i_b * H + i_q) * N + o_q
                b_qr, b_qs = load_rows(p_q, o_q, m_q, stride_qn, R, BR), load_rows(p_q + R, o_q, m_q, stride_qn, S, BS)
                b_lse, b_limit = tl.load(lse + o_row, mask=m_q, other=0.0), tl.load(used + o_row, mask=m_q, other=0.0)
                m_s = visible(o_q, o_n, M, CAUSAL) & m_q[:, None]
                b_p, b_gate, b_slope = weights_of(b_qr, b_qs, b_kr, b_ks, b_limit, b_lse, m_s, scale, scale_s, PREC)
                b_g = load_rows(grad, o_row, m_q, DV, DV, BDV)
                b_dv += tl.dot(tl.trans((b_p * b_gate).to(b_g.dtype)), b_g, input_precision=PREC)
                b_dw = tl.dot(b_g, tl.trans(b_v), input_precision=PREC)
                b_dks += tl.dot(tl.trans((b_p * b_dw * b_slope).to(b_qs.dtype)), b_qs, input_precision=PREC)
                b_ds = b_p * (b_dw * b_gate - tl.load(delta + o_row, mask=m_q, other=0.0)[:, None])
                b_dkr += tl.dot(tl.trans(b_ds.to(b_qr.dtype)), b_qr, input_precision=PREC)
    o_row = i_kv.to(tl.int64) * M + o_n
    if SOME:
        b_dkr += load_rows(dk, o_row, m_n, R + S, R, BR) / scale
        b_dks += load_rows(dk + R, o_row, m_n, R + S, S, BS) / scale_s
        b_dv += load_rows(dv, o_row, m_n, DV, DV, BDV)
    store_rows(dk, o_row, m_n, R + S, b_dkr * scale, R, BR)
    store_rows(dk + R, o_row, m_n, R + S, b_dks * scale_s, S, BS)
    store_rows(dv, o_row, m_n, DV, b_dv, DV, BDV)


def supported(dim: int, dim_v: int, dtype: torch.dtype) -> list[str]:
    """Why such a call cannot be run; empty means it can."""
    checks = (
        (dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"),
        (max(dim, dim_v) > MOST_DIM, f"takes head dimensions up to {MOST_DIM}, not {max(dim, dim_v)}"),
        (dim < 2, f"D = {dim} cannot be split in two"),
    )
    return [reason for fails, reason in checks if fails]


def spark_attention(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, *, causal: bool = False
) -> Tensor:
    """`q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `v: [B, Hkv, M, Dv]`, thresholds `limit: [B, H, N]` (float32) -> `[B, H, N, Dv]`.

    The first `predictor` dimensions predict. Raises ValueError where the call is not supported.
    """
    reasons = supported(q.shape[3], v.shape[3], q.dtype)
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    if not fits or limit.shape != q.shape[:3] or not q.dtype == k.dtype == v.dtype or not 0 < predictor < q.shape[3]:
        reasons.append(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, limit {list(limit.shape)}, predictor {predictor} do not fit"
        )
    if reasons:
        raise ValueError("; ".join(reasons))
    out: Tensor = spark_forward(q, k, v, limit, predictor, scale, scale_s, causal)[0]
    return out


def _width(d: int) -> int:
    return max(16, power(d))


def _constants(q: Tensor, k: Tensor, v: Tensor, predictor: int, *, causal: bool, backward: bool) -> dict[str, Any]:
    """Constants of the kernels of pairs: tiles of 64 queries and keys, smaller where rows are wide and where registers run out."""
    r, s, dv, fp32 = predictor, q.shape[3] - predictor, v.shape[3], q.dtype == torch.float32
    big = max(q.shape[3], dv) > 64
    return {
        "G": q.shape[1] // k.shape[1], "R": r, "S": s, "DV": dv, "BR": _width(r), "BS": _width(s), "BDV": _width(dv),
        "BQ": 32 if backward and fp32 else 64, "BN": 32 if fp32 or big else 64, "CAUSAL": causal, "PREC": "tf32x3" if fp32 else "tf32",
        "num_warps": 8 if backward and big else 4, "num_stages": 2 if backward or fp32 else 3,
    }  # fmt: skip


@define("spark_statistics", final=True)
def spark_statistics(q: Tensor, k: Tensor, predictor: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, `[B, H, N]` in float32, of the predicted scores that causal queries see."""
    q, k = unit_rows(q), unit_rows(k)
    b, h, n, _ = q.shape
    mean, squares = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    fp32, tiles = q.dtype == torch.float32, -(-n // 64)
    with on_device(q):
        spark_statistics_kernel[(b * h * tiles,)](
            q, k, mean, squares, *q.stride()[:3], *k.stride()[:3], h, n, k.shape[2], tiles, G=h // k.shape[1], R=predictor,
            BR=_width(predictor), BQ=64, BN=64, PREC="tf32x3" if fp32 else "tf32", num_warps=4,
        )  # fmt: skip
    return mean, squares


@torch.library.register_fake(spark_statistics)
def _(q: Tensor, k: Tensor, predictor: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


@define("spark_forward")
def spark_forward(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the base-2 log-sum-exp and the threshold used, `[B, H, N]` each."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    b, h, n, _ = q.shape
    out = q.new_empty(b, h, n, v.shape[3])
    lse, used = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    constants = _constants(q, k, v, predictor, causal=causal, backward=False)
    tiles = -(-n // constants["BQ"])
    with on_device(q):
        spark_attend_kernel[(b * h * tiles,)](
            q, k, v, limit.float().contiguous(), q, out, lse, used, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, k.shape[2],
            tiles, scale, scale_s, SOME=False, **constants,
        )  # fmt: skip
    return out, lse, used


@torch.library.register_fake(spark_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, torch.empty_like(lse)


@define("spark_backward", final=True)
def spark_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, used: Tensor, predictor: int, scale: float, scale_s: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    q, k, v, grad = unit_rows(q), unit_rows(k), unit_rows(v), grad.contiguous()
    (b, h, n, _), m = q.shape, k.shape[2]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = (grad.float() * out.float()).sum(-1)
    constants = _constants(q, k, v, predictor, causal=causal, backward=True)
    shared = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, m)
    with on_device(q):
        tiles = -(-n // constants["BQ"])
        spark_query_gradient_kernel[(b * h * tiles,)](
            q, k, v, grad, lse, used, delta, q, dq, *shared, tiles, scale, scale_s, SOME=False, **constants
        )  # fmt: skip
        tiles = -(-m // constants["BN"])
        spark_key_gradient_kernel[(b * k.shape[1] * tiles,)](
            q, k, v, grad, lse, used, delta, q, q, dk, dv, *shared, tiles, scale, scale_s, SOME=False, **constants
        )  # fmt: skip
    return dq, dk, dv


@torch.library.register_fake(spark_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, used: Tensor, predictor: int, scale: float, scale_s: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, *ctx.setting = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (1 + len(ctx.setting))
    if grad is None:
        return None, None, None, *none
    return *spark_backward(grad, *ctx.saved_tensors, *ctx.setting), *none


torch.library.register_autograd(spark_forward, _grad, setup_context=_save)
