"""Launches, and the operator as torch sees it: two operators, shapes for tracing, and the gradient that links them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define, on_device, power, unit_rows
from ..blocks._keys import delta_kernel
from ._attend import compressed_attend_kernel
from ._choose import block_select_kernel, importance_kernel
from ._gradient import compressed_key_gradient_kernel, compressed_query_gradient_kernel
from ._plan import Selection, plan

SLAB_BYTES = 1 << 30
"""bytes of the importances that exist at a time"""
PROGRAMS = 512
"""programs, at least, that sums over queries are split among"""


def _choose(q: Tensor, k: Tensor, lse: Tensor, s: Selection, scale: float) -> Tensor:
    """Chosen blocks, a slab of queries after the other."""
    (b, h, n, d), hk, blocks = q.shape, k.shape[1], s.blocks
    sizes, warps = plan(q, k, k)
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
    (b, h, n, _), (sizes, warps) = q.shape, plan(q, k, v)
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
    sizes, warps = plan(q, k, v)
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
