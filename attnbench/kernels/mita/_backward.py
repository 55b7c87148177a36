"""The backward pass: at most nine launches, every sum in a fixed order.

With `p` the joint softmax, `G = dO`, `delta_i = G_i . o_i`: queries first (dq, delta), then the landmarks as keys (du = sum p G and
their share of dr), then one pass over keys and values for the landmarks as probes, then the experts' keys, whose gradients are
summed a segment of an expert at a time, sorted by key and added to dk and dv; last, pooling adds its share to dq.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._forward import Saved, Setting, rows, sizes
from ._gradient import probe_grad_kernel, query_grad_kernel, routed_grad_kernel, shared_grad_kernel
from ._plan import Plan, power
from ._reduce import finish_kernel, rank_kernel, scatter_kernel, sum_landmark_kernel, sum_probe_kernel

if TYPE_CHECKING:
    from collections.abc import Mapping


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, setting: Setting) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dr); dr, in float32, includes what pooling passes on to dq."""
    grad, q, k, v = rows(grad), rows(q), rows(k), rows(v)
    m = saved.r.shape[2]
    top, s, group, p = sizes(q, k, v, m, setting)
    common = {"G": group, "M": m, "D": q.shape[3], "DV": v.shape[3], "BD": p.dim, "BDV": p.dim_v, "PREC": p.prec}
    dq, delta = query_grad(grad, q, k, v, out, saved, setting, top, s, p, common)
    if setting.shared:
        dk, dv, dr = landmark_grad(grad, q, k, v, saved, delta, setting, p, common)
    else:
        dk, dv = torch.zeros_like(k, memory_format=torch.contiguous_format), torch.zeros_like(v, memory_format=torch.contiguous_format)
        # landmarks get no gradient through the selection; pooled ones need none written
        dr = (torch.empty if setting.grid else torch.zeros)(saved.r.shape, dtype=torch.float32, device=q.device)
    if setting.routed:
        routed_grad(grad, q, k, v, dk, dv, saved, delta, setting, top, s, p, common)
    pooled = setting.shared and bool(setting.grid)
    if pooled or s > 1:
        dq = finish(dq, q, dr, setting, s, pooled, p)
    return dq, dk, dv, dr


def query_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, setting: Setting, top: int, s: int, p: Plan,
    common: Mapping[str, object],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq of the attention, one part a slot, and delta `[B, H, N]`."""
    (b, h, n, d), m = q.shape, saved.r.shape[2]
    dq = torch.empty(b, h, s * n, d, dtype=torch.float32 if s > 1 else q.dtype, device=q.device)
    delta = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    tiles = p.tiles(s * n, m) if setting.routed else -(-n // p.tile)
    query_grad_kernel[(b * h * tiles,)](
        grad, q, k, v, out, saved.lse, saved.r, saved.value, saved.index, saved.order, saved.start, saved.tile, dq, delta,
        *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, tiles, setting.scale, setting.shared_scale,
        K=top, S=s, T=p.tile, BM=p.block_m, BK=p.block_k, MP=p.landmarks, SHARED=setting.shared, ROUTED=setting.routed, **common,
        num_warps=p.attend_warps,
    )  # fmt: skip
    return dq, delta


def landmark_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, delta: Tensor, setting: Setting, p: Plan,
    common: Mapping[str, object],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dk and dv through the landmark values, and dr."""
    (b, h, n, d), m, dv = q.shape, saved.r.shape[2], v.shape[3]
    float_ = {"dtype": torch.float32, "device": q.device}
    heads, kv_heads, keys, parts, group = b * h, b * k.shape[1], k.shape[2], -(-n // p.stream), h // k.shape[1]
    part_r, part_u = torch.empty(heads * parts * m, d, **float_), torch.empty(heads * parts * m, dv, **float_)
    shared_grad_kernel[(heads * p.probe_tiles * parts,)](
        grad, q, saved.lse, delta, saved.r, saved.value, part_r, part_u, *grad.stride()[:3], *q.stride()[:3], h, n, parts,
        setting.shared_scale, MT=p.probe_tiles, ROWS=p.stream, T=p.tile, BM=p.block_m,
        **{key: x for key, x in common.items() if key != "G"},
        num_warps=p.grad_warps, num_stages=2,
    )  # fmt: skip
    u, u_delta, dr = torch.empty_like(saved.value), torch.empty(heads, m, **float_), torch.empty(b, h, m, d, **float_)
    widths = {key: common[key] for key in ("D", "DV", "BD", "BDV")}
    sum_landmark_kernel[(heads * m,)](part_r, part_u, saved.value, saved.stat, u, u_delta, dr, parts, M=m, BP=16, **widths, num_warps=2)
    dk, dv_ = k.new_empty(k.shape), v.new_empty(v.shape)
    blocks = -(-keys // p.key_block)
    splits, once = min(blocks, p.key_splits), p.probe_tiles == 1 and group == 1
    part = torch.empty(heads * (splits if once else p.probe_splits) * m, d, **float_)
    strides = (*k.stride()[:3], *v.stride()[:3])
    tail = {"MT": p.probe_tiles, "BM": p.block_m, "BN": p.key_block, **common, "num_warps": p.grad_warps, "num_stages": 2}
    probe_grad_kernel[(kv_heads * splits,)](
        saved.r, k, v, u, u_delta, saved.stat, dk, dv_, part, *strides, h, keys, splits, blocks, setting.scale,
        KEYS=True, PROBES=once, **tail,
    )  # fmt: skip
    if not once:
        splits = min(blocks, p.probe_splits)
        probe_grad_kernel[(heads * p.probe_tiles * splits,)](
            saved.r, k, v, u, u_delta, saved.stat, dk, dv_, part, *strides, h, keys, splits, blocks, setting.scale, KEYS=False, PROBES=True,
            **tail,
        )  # fmt: skip
    sum_probe_kernel[(heads * m,)](part, dr, splits, M=m, D=d, BD=p.dim, BP=16, num_warps=2)
    return dk, dv_, dr


def routed_grad(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, saved: Saved, delta: Tensor, setting: Setting,
    top: int, s: int, p: Plan, common: Mapping[str, object],
) -> None:  # fmt: skip
    """Add the gradients of the experts' keys and values to dk and dv."""
    (b, h, n, d), m = q.shape, saved.r.shape[2]
    int_ = {"dtype": torch.int32, "device": q.device}
    heads, kv_heads, group, segments = b * h, b * k.shape[1], h // k.shape[1], p.segments(s * n, m)
    pairs, tiles = group * m * top, -(-top // p.block_k)
    part = torch.empty(heads * segments * top, d, dtype=torch.float32, device=q.device)
    part_v = torch.empty(heads * segments * top, v.shape[3], dtype=torch.float32, device=q.device)
    key, pair, first = torch.empty(kv_heads, pairs, **int_), torch.empty(kv_heads, pairs, **int_), torch.empty(heads, m + 1, **int_)
    rank_kernel[(heads * m,)](
        saved.index, saved.start, key, pair, first, SEGMENT=p.segment, LISTS=group * m, M=m, K=top, KP=power(top),
        BL=max(1, min(power(group * m), 2048 // power(top))), MP=p.landmarks, num_warps=4,
    )  # fmt: skip
    routed_grad_kernel[(heads * segments * tiles,)](
        grad, q, k, v, saved.lse, delta, saved.index, saved.order, saved.start, first, part, part_v, *grad.stride()[:3], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], h, n, segments, setting.scale, K=top, S=s, KT=tiles, SEGMENT=p.segment, T=p.tile,
        BK=p.block_k, MP=p.landmarks, **common, num_warps=p.grad_warps, num_stages=2,
    )  # fmt: skip
    widths = {name: common[name] for name in ("G", "D", "DV", "BD", "BDV")}
    rows_ = 16
    blocks = -(-pairs // rows_)
    scatter_kernel[(kv_heads * blocks,)](
        part, part_v, key, pair, first, dk, dv, k.shape[2], blocks, segments, M=m, K=top, PAIRS=pairs, BP=rows_, **widths, num_warps=4
    )  # fmt: skip


def finish(dq: Tensor, q: Tensor, dr: Tensor, setting: Setting, s: int, pooled: bool, p: Plan) -> Tensor:
    """Sum the slots of dq and add what comes through pooling."""
    b, h, n, d = q.shape
    out, blocks = q.new_empty(b, h, n, d) if s > 1 else dq, -(-n // p.finish_block)
    finish_kernel[(b * h * blocks,)](
        dq, dr, out, n, blocks, *(setting.grid or (0, 1, n, 1, 1)), S=s, D=d, BD=p.dim, BT=p.finish_block, POOLED=pooled, num_warps=4
    )  # fmt: skip
    return out
