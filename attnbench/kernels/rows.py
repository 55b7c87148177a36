"""Weighted sums of rows in Triton: `out[r] = sum_u weights[r, u] v[index[r, u]]`, where queries choose few tokens each.

Programs: R queries of one head, all D channels; U rows are gathered one after the other and summed in float32 registers. Bytes that
cross memory: index and weights once, the output once, v as often as the cache lets go of it. The backward pass gathers the same rows for
the gradient of the weights and adds to a float32 gradient of v atomically, in no fixed order; rows of weight 0 are not added to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._define import define, on_device, power

__all__ = ["mix_rows"]

_TILE = 2048  # numbers of a tile of queries and channels


@triton.jit
def mix_rows_kernel(v, index, weights, out, G, N, R, U: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """One tile of the output of one head."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_r, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_r, m_d = o_r < R, (o_d < D)[None, :]
    p_u, p_v = (i_bh * R + o_r) * U, v + (i_bh // G) * N * D + o_d[None, :]
    # [BR, BD]
    b_out = tl.zeros([BR, BD], tl.float32)
    for i in range(U):
        b_i = tl.load(index + p_u + i, mask=m_r, other=0).to(tl.int64)
        b_w = tl.load(weights + p_u + i, mask=m_r, other=0.0)
        b_out += b_w[:, None] * tl.load(p_v + b_i[:, None] * D, mask=m_r[:, None] & m_d, other=0.0).to(tl.float32)
    tl.store(out + (i_bh * R + o_r)[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_r[:, None] & m_d)


@triton.jit
def spread_rows_kernel(
    v, index, weights, grad, dv, dweights, G, N, R, U: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Gradients of the weights of one tile, and its part of the gradient of v."""
    i_bh = tl.program_id(1).to(tl.int64)
    o_r, o_d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_r, m_d = o_r < R, (o_d < D)[None, :]
    p_u, p_v = (i_bh * R + o_r) * U, (i_bh // G) * N * D + o_d[None, :]
    # [BR, BD]
    b_g = tl.load(grad + (i_bh * R + o_r)[:, None] * D + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0).to(tl.float32)
    for i in range(U):
        b_i = tl.load(index + p_u + i, mask=m_r, other=0).to(tl.int64)
        b_w = tl.load(weights + p_u + i, mask=m_r, other=0.0)
        b_v = tl.load(v + p_v + b_i[:, None] * D, mask=m_r[:, None] & m_d, other=0.0).to(tl.float32)
        tl.store(dweights + p_u + i, tl.sum(b_g * b_v, 1), mask=m_r)
        tl.atomic_add(dv + p_v + b_i[:, None] * D, b_w[:, None] * b_g, mask=(b_w != 0)[:, None] & m_d, sem="relaxed")


def mix_rows(v: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`v: [B, Hkv, N, D]`, index and weights `[B, H, R, U]` -> `[B, H, R, D]` in the dtype of v; Hkv divides H, D is at most 256."""
    return mix_rows_forward(v.contiguous(), index.int().contiguous(), weights.float().contiguous())


def _launch(v: Tensor, index: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, sizes and constants of both kernels."""
    (b, h, r, u), d = index.shape, v.shape[3]
    wide = max(16, power(d))
    tile = max(1, _TILE // wide)
    return (-(-r // tile), b * h), {"G": h // v.shape[1], "N": v.shape[2], "R": r, "U": u, "D": d, "BD": wide, "BR": tile}


@define("mix_rows")
def mix_rows_forward(v: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sums."""
    grid, sizes = _launch(v, index)
    out = v.new_empty(*index.shape[:3], v.shape[3])
    with on_device(v):
        mix_rows_kernel[grid](v, index, weights, out, **sizes)
    return out


@torch.library.register_fake(mix_rows_forward)
def _(v: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return v.new_empty(*index.shape[:3], v.shape[3])


@define("spread_rows", final=True)
def spread_rows(grad: Tensor, v: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v, in float32, and of the weights."""
    grid, sizes = _launch(v, index)
    dv, dweights = torch.zeros(v.shape, dtype=torch.float32, device=v.device), torch.empty_like(weights)
    with on_device(v):
        spread_rows_kernel[grid](v, index, weights, grad.contiguous(), dv, dweights, **sizes)
    return dv, dweights


@torch.library.register_fake(spread_rows)
def _(grad: Tensor, v: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(v.shape, dtype=torch.float32, device=v.device), torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    v, index, weights = ctx.saved_tensors
    dv, dweights = spread_rows(grad, v, index, weights)
    return dv.to(v.dtype), None, dweights


torch.library.register_autograd(mix_rows_forward, _grad, setup_context=_save)
