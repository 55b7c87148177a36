"""Spark attention by lists, in Triton: one pass over pairs finds the keys that reach a query's threshold, and only these are read again.

The first kernel scores every pair in the R dimensions that predict and lists the keys kept, at most L a query, in order. Two kernels then
gather them, forward and backward: a query costs what it keeps. Where a tile of 64 queries has one that keeps more than L keys, or none,
so that the largest counts, the kernels of `spark` take that tile, forward and backward, as they would take all; nothing is read back.

Work of a head: `2 N M R` FLOP to find the keys, then `2 N K (D + Dv)` forward and `2 N K (3 D + 2 Dv)` backward for K kept. Kept beside
inputs and output: `4 N (L + 2)` bytes a head. dk and dv are added up atomically, in no fixed order: they differ in the last bits from call
to call.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power, unit_rows
from ._tile import LOG2E, load_rows
from .gather import load_row
from .spark import (
    DTYPES,
    _constants,
    _width,
    gate_of,
    spark_attend_kernel,
    spark_key_gradient_kernel,
    spark_query_gradient_kernel,
    visible,
)

__all__ = ["spark_listed"]

TILE = 64
"""queries a tile of the kernel that lists"""


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
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_row // N, i_row % N
    if tl.load(flags + i_bh * TILES + i_q // TQ) != 0:
        return
    i_b, i_h = i_bh // H, i_bh % H
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    p_q = q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qn
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
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_row // N, i_row % N
    if tl.load(flags + i_bh * TILES + i_q // TQ) != 0:
        return
    i_b, i_h = i_bh // H, i_bh % H
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    p_q = q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qn
    p_dk, p_dv = dk + i_bh // G * M * (R + S), dv + i_bh // G * M * DV
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


def spark_listed(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, *, causal: bool = False
) -> Tensor:
    """As `spark.spark_attention`, by lists of up to `longest` keys a query."""
    if q.dtype not in DTYPES or not 0 < predictor < q.shape[3] or longest < 1:
        raise ValueError(f"cannot list keys of {q.dtype} queries {list(q.shape)} by {predictor} dimensions in lists of {longest}")
    out: Tensor = listed_forward(q, k, v, limit, predictor, scale, scale_s, longest, causal)[0]
    return out


def _gathers(q: Tensor, k: Tensor, v: Tensor, predictor: int, longest: int) -> dict[str, Any]:
    """Constants of the kernels that gather: tiles of as many keys as make 4096 numbers."""
    r, s, dv = predictor, q.shape[3] - predictor, v.shape[3]
    br, bs, bdv = (power(x) for x in (r, s, dv))
    return {
        "G": q.shape[1] // k.shape[1], "R": r, "S": s, "DV": dv, "BR": br, "BS": bs, "BDV": bdv, "L": longest, "TQ": TILE,
        "BK": min(64, power(longest), max(8, 4096 // max(br + bs, bdv))), "num_warps": 2,
    }  # fmt: skip


@define("spark_listed_forward")
def listed_forward(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the base-2 log-sum-exp and the threshold used `[B, H, N]`, lists `[B, H, N, L]`, their lengths, tiles without."""
    q, k, v, limit = unit_rows(q), unit_rows(k), unit_rows(v), limit.float().contiguous()
    (b, h, n, _), m, fp32 = q.shape, k.shape[2], q.dtype == torch.float32
    out, tiles = q.new_empty(b, h, n, v.shape[3]), -(-n // TILE)
    lse, used = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    index, count, flags = (torch.empty(b, h, *size, dtype=torch.int32, device=q.device) for size in ((n, longest), (n,), (tiles,)))
    strides, gathers = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), _gathers(q, k, v, predictor, longest)
    with on_device(q):
        spark_list_kernel[(b * h * tiles,)](
            q, k, limit, index, count, flags, *q.stride()[:3], *k.stride()[:3], h, n, m, tiles, G=gathers["G"], R=predictor,
            BR=_width(predictor), L=longest, BQ=TILE, BN=64, CAUSAL=causal, PREC="tf32x3" if fp32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        spark_gather_kernel[(b * h * n,)](q, k, v, index, count, flags, out, lse, *strides, h, n, tiles, scale, scale_s, **gathers)
        spark_attend_kernel[(b * h * tiles,)](
            q, k, v, limit, flags, out, lse, used, *strides, h, n, m, tiles, scale, scale_s, SOME=True,
            **_constants(q, k, v, predictor, causal=causal, backward=False),
        )  # fmt: skip
    return out, lse, used, index, count, flags


@torch.library.register_fake(listed_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    index, count, flags = (q.new_empty(b, h, *size, dtype=torch.int32) for size in ((n, longest), (n,), (-(-n // TILE),)))
    return q.new_empty(b, h, n, v.shape[3]), lse, torch.empty_like(lse), index, count, flags


@define("spark_listed_backward", final=True)
def listed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, grad, (out, lse, used, index, count, flags) = unit_rows(q), unit_rows(k), unit_rows(v), grad.contiguous(), saved
    (b, h, n, _), m, tiles = q.shape, k.shape[2], flags.shape[2]
    dq, delta = q.new_empty(q.shape), (grad.float() * out.float()).sum(-1)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    strides, constants = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), _constants(q, k, v, predictor, causal=causal, backward=True)
    shared, some = (*strides, h, n, m), flags.amax()
    with on_device(q):
        spark_spread_kernel[(b * h * n,)](
            q, k, v, index, count, flags, grad, lse, delta, dq, dk, dv, *shared, tiles, scale, scale_s,
            **_gathers(q, k, v, predictor, index.shape[3]),
        )  # fmt: skip
        tiles = -(-n // constants["BQ"])
        spark_query_gradient_kernel[(b * h * tiles,)](
            q, k, v, grad, lse, used, delta, flags, dq, *shared, tiles, scale, scale_s, SOME=True, **constants
        )  # fmt: skip
        tiles = -(-m // constants["BN"])
        spark_key_gradient_kernel[(b * k.shape[1] * tiles,)](
            q, k, v, grad, lse, used, delta, flags, some, dk, dv, *shared, tiles, scale, scale_s, SOME=True, **constants
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@torch.library.register_fake(listed_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, *setting, _, causal = inputs
    ctx.setting = (*setting, causal)
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (2 + len(ctx.setting))
    if grad is None:
        return None, None, None, *none
    q, k, v, *saved = ctx.saved_tensors
    return *listed_backward(grad, q, k, v, saved, *ctx.setting), *none


torch.library.register_autograd(listed_forward, _grad, setup_context=_save)
