"""Attention of every query to a list of keys of its own, in Triton: forward and backward.

`o_i = sum_j softmax_j(scale q_i . k_j) v_j` over `j` in `index[i]`, entries below 0 left out; a query whose list is empty gets 0. Lists
may be one for all heads. One program a query and head gathers its keys and values, BK at a time, from cache where k and v fit it, and
folds them into a running softmax in float32 registers. The backward pass gathers them again, computes the weights anew from the kept
log-sum-exp, and adds to float32 gradients of k and v atomically, in no fixed order: dk and dv differ in the last bits from call to call.

Work of a head with K keys a query: `2 N K (D + Dv)` FLOP forward, `2 N K (3 D + 2 Dv)` backward. Bytes: `N K (D + Dv)` elements gathered
each way, `8 N K (D + Dv)` bytes of atomic additions, indices once. Kept beside inputs and output: `4 N` bytes a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power, unit_rows
from ._tile import LOG2E, load_rows

__all__ = ["gather_attention", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 256


@triton.jit
def load_row(p_row, D: tl.constexpr, BD: tl.constexpr):
    """One row in float32, `[1, BD]`."""
    o_d = tl.arange(0, BD)
    return tl.load(p_row + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gather_attend_kernel(
    q, k, v, index, out, lse,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, K, scale,
    G: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One query of one head; LISTS lists a query, one a head or one for all. `lse` is base 2."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_row // N, i_row % N
    i_b, i_h = i_bh // H, i_bh % H
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    p_index = index + ((i_b * LISTS + i_h % LISTS) * N + i_q) * K
    b_q = load_row(q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qn, D, BD) * (scale * LOG2E)
    top = float("-inf")
    total = 0.0
    b_acc = tl.zeros([BDV], tl.float32)
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_j = tl.load(p_index + o_k, mask=o_k < K, other=-1)
        m_k = b_j >= 0
        # [BK, BD]
        b_k = load_rows(p_k, b_j, m_k, stride_kn, D, BD).to(tl.float32)
        b_s = tl.where(m_k, tl.sum(b_k * b_q, 1), float("-inf"))
        new = tl.maximum(top, tl.max(b_s, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        b_p, decay = tl.exp2(b_s - safe), tl.exp2(top - safe)
        # [BK, BDV]
        b_v = load_rows(p_v, b_j, m_k, stride_vn, DV, BDV).to(tl.float32)
        total = total * decay + tl.sum(b_p, 0)
        b_acc = b_acc * decay + tl.sum(b_p[:, None] * b_v, 0)
        top = new
    o_v = tl.arange(0, BDV)
    b_out = b_acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + i_row * DV + o_v, b_out.to(out.dtype.element_ty), mask=o_v < DV)
    tl.store(lse + i_row, tl.where(total == 0.0, float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total))))


@triton.jit
def gather_gradient_kernel(
    q, k, v, index, out, lse, grad, dq, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    H, N, M, K, scale,
    G: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq of one query of one head, and its parts of dk and dv, which are contiguous and float32."""
    i_row = tl.program_id(0).to(tl.int64)
    i_bh, i_q = i_row // N, i_row % N
    i_b, i_h = i_bh // H, i_bh % H
    p_k, p_v = k + i_b * stride_kb + i_h // G * stride_kh, v + i_b * stride_vb + i_h // G * stride_vh
    p_dk, p_dv = dk + i_bh // G * M * D, dv + i_bh // G * M * DV
    p_index = index + ((i_b * LISTS + i_h % LISTS) * N + i_q) * K
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    b_q = load_row(q + i_b * stride_qb + i_h * stride_qh + i_q * stride_qn, D, BD)
    b_g, b_o = load_row(grad + i_row * DV, DV, BDV), load_row(out + i_row * DV, DV, BDV)
    delta, top = tl.sum(b_g * b_o), tl.load(lse + i_row)
    b_dq = tl.zeros([BD], tl.float32)
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        b_j = tl.load(p_index + o_k, mask=o_k < K, other=-1)
        m_k = b_j >= 0
        # [BK, BD], [BK, BDV]
        b_k = load_rows(p_k, b_j, m_k, stride_kn, D, BD).to(tl.float32)
        b_v = load_rows(p_v, b_j, m_k, stride_vn, DV, BDV).to(tl.float32)
        b_p = tl.where(m_k, tl.exp2(tl.sum(b_k * b_q, 1) * (scale * LOG2E) - top), 0.0)
        b_ds = b_p * (tl.sum(b_v * b_g, 1) - delta) * scale
        b_dq += tl.sum(b_ds[:, None] * b_k, 0)
        o_j = tl.where(m_k, b_j, 0).to(tl.int64)[:, None]
        tl.atomic_add(p_dk + o_j * D + o_d[None, :], b_ds[:, None] * b_q, mask=m_k[:, None] & (o_d < D)[None, :], sem="relaxed")
        tl.atomic_add(p_dv + o_j * DV + o_v[None, :], b_p[:, None] * b_g, mask=m_k[:, None] & (o_v < DV)[None, :], sem="relaxed")
    tl.store(dq + i_row * D + o_d, b_dq.to(dq.dtype.element_ty), mask=o_d < D)


def supported(dim: int, dim_v: int, dtype: torch.dtype) -> list[str]:
    """Why such a call cannot be run; empty means it can."""
    checks = (
        (dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"),
        (max(dim, dim_v) > MOST_DIM, f"takes head dimensions up to {MOST_DIM}, not {max(dim, dim_v)}"),
    )
    return [reason for fails, reason in checks if fails]


def gather_attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float | None = None) -> Tensor:
    """`q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `v: [B, Hkv, M, Dv]`, `index: [B, H or 1, N, K]` (int32) -> `[B, H, N, Dv]`.

    `scale` defaults to `D ** -0.5`. Raises ValueError where the call is not supported.
    """
    reasons = supported(q.shape[3], v.shape[3], q.dtype)
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    if not fits or index.shape[:3] not in ((q.shape[0], q.shape[1], q.shape[2]), (q.shape[0], 1, q.shape[2])):
        reasons.append(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} and index {list(index.shape)} do not fit")
    if not q.dtype == k.dtype == v.dtype or index.dtype != torch.int32:
        reasons.append("q, k and v must be of one dtype, and index of int32")
    if reasons:
        raise ValueError("; ".join(reasons))
    out: Tensor = gather_forward(q, k, v, index, q.shape[3] ** -0.5 if scale is None else scale)[0]
    return out


def _sizes(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> dict[str, Any]:
    """Constants of both kernels; tiles of 64 keys of 64 channels, and fewer where there are fewer or wider ones."""
    d, dv = q.shape[3], v.shape[3]
    width = power(max(d, dv))
    keys = min(power(index.shape[3]), max(8, 4096 // width))
    return {
        "G": q.shape[1] // k.shape[1], "LISTS": index.shape[1], "D": d, "DV": dv, "BD": power(d),
        "BDV": power(dv), "BK": keys, "num_warps": 2 if keys * width >= 2048 else 1,
    }  # fmt: skip


@define("gather_forward")
def gather_forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the base-2 log-sum-exp `[B, H, N]` (inf where a list is empty)."""
    q, k, v, index = unit_rows(q), unit_rows(k), unit_rows(v), index.contiguous()
    b, h, n, _ = q.shape
    out, lse = q.new_empty(b, h, n, v.shape[3]), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    with on_device(q):
        gather_attend_kernel[(b * h * n,)](
            q, k, v, index, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, index.shape[3], scale,
            **_sizes(q, k, v, index),
        )  # fmt: skip
    return out, lse


@torch.library.register_fake(gather_forward)
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@define("gather_backward", final=True)
def gather_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, index = unit_rows(q), unit_rows(k), unit_rows(v), index.contiguous()
    b, h, n, d = q.shape
    dq = q.new_empty(b, h, n, d)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    with on_device(q):
        gather_gradient_kernel[(b * h * n,)](
            q, k, v, index, out, lse, grad.contiguous(), dq, dk, dv, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            h, n, k.shape[2], index.shape[3], scale, **_sizes(q, k, v, index),
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@torch.library.register_fake(gather_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *gather_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


torch.library.register_autograd(gather_forward, _grad, setup_context=_save)
