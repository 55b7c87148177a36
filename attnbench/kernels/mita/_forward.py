"""The forward pass: six launches, seven when a query reads several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._attend import attend_kernel, merge_kernel
from ._landmark import pool_kernel, probe_kernel
from ._launch import Launcher, signature
from ._plan import Plan, most_segments, plan, power, processors
from ._route import gate_kernel, permute_kernel
from ._select import select_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence


class Setting(NamedTuple):
    """What the operator computes, beside its tensors."""

    topk: int
    experts: int
    """experts a query"""
    shared: bool
    routed: bool
    scale: float
    shared_scale: float
    grid: tuple[int, ...]
    """(prefix, grid height, grid width, pool height, pool width), empty where landmarks are given"""


class Saved(NamedTuple):
    """What the forward pass keeps for the backward pass, beside q, k, v and the output."""

    lse: Tensor
    """[B, H, N], base 2"""
    r: Tensor
    """[B, H, M, D] landmarks"""
    value: Tensor
    """[B, H, M, Dv] landmark values"""
    stat: Tensor
    """[B, H, M, 2] maximum (base 2) and sum of the landmarks' softmax"""
    index: Tensor
    """[B, H, M, K] selected keys, ascending"""
    order: Tensor
    """[B, H, S N] pairs slot N + query, grouped by expert"""
    start: Tensor
    """[B, H, M + 1] first pair of each expert"""
    segment: Tensor
    """[B, H, most_segments, 4]: expert, first pair and last pair + 1 of each segment, empty ones last"""


def sizes(q: Tensor, k: Tensor, v: Tensor, m: int, setting: Setting) -> tuple[int, int, int, Plan]:
    """(K, S, G, plan): selected keys and experts a query, clamped; query heads a key head; the launch plan."""
    top, s, group = min(setting.topk, k.shape[2]), min(setting.experts, m) if setting.routed else 1, q.shape[1] // k.shape[1]
    heads, fp32 = q.shape[0] * q.shape[1], q.dtype == torch.float32
    return top, s, group, plan(heads, q.shape[2], k.shape[2], m, top, s, q.shape[3], v.shape[3], fp32, processors(q.device))


def rows(x: Tensor) -> Tensor:
    """`x` itself where its innermost stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def pooled(launch: Launcher, q: Tensor, grid: Sequence[int], p: Plan) -> Tensor:
    """Adaptive average of q over its token grid."""
    b, h, _, d = q.shape
    prefix, gh, gw, ph, pw = grid
    r = q.new_empty(b, h, ph * pw, d)
    launch(
        pool_kernel, b * h * ph * pw,
        q, r, *q.stride()[:3], h, prefix, gh, gw, ph, pw, D=d, BD=p.dim, BT=p.pool_block, num_warps=4
    )  # fmt: skip
    return r


def build_experts(launch: Launcher, r: Tensor, k: Tensor, v: Tensor, top: int, setting: Setting, p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Landmark values, their softmax statistics, and the keys of every expert."""
    (b, h, m, d), n, dv = r.shape, k.shape[2], v.shape[3]
    heads, blocks, splits, group = b * h, -(-n // p.probe_block), p.probe_splits, h // k.shape[1]
    chunks, width = blocks * p.probe_block // p.chunk, power(top)
    float_ = {"dtype": torch.float32, "device": k.device}
    of = heads * m if setting.shared else 0
    value, stat = v.new_empty(b, h, m if setting.shared else 0, dv), torch.empty(b, h, m if setting.shared else 0, 2, **float_)
    acc, part = torch.empty(of * splits, dv, **float_), torch.empty(2, of * splits, **float_)
    of = heads * m if setting.routed else 0
    index = torch.empty(b, h, m if setting.routed else 0, top, dtype=torch.int32, device=k.device)
    chunk_max, score = torch.empty(of, chunks, **float_), torch.empty(of, width * p.chunk, **float_)
    list_ = torch.empty(of, width, dtype=torch.int32, device=k.device)
    groups = -(-chunks // p.group)
    common = {"G": group, "M": m, "D": d, "DV": dv, "C": p.chunk, "BN": p.probe_block, "BD": p.dim, "BDV": p.dim_v,
              "SHARED": setting.shared, "ROUTED": setting.routed}  # fmt: skip
    launch(
        probe_kernel, heads * p.probe_tiles * splits,
        r, k, v, chunk_max, acc, part[0], part[1], *k.stride()[:3], *v.stride()[:3], h, n, splits, blocks, setting.scale,
        MT=p.probe_tiles, BM=p.block_m, PREC=p.prec, **common, num_warps=4, num_stages=3 if p.probe_block == 128 else 2,
    )  # fmt: skip
    launch(
        select_kernel, heads * m,
        r, k, chunk_max, acc, part[0], part[1], value, stat, index, list_, score, *k.stride()[:3], h, n, splits, chunks, groups,
        K=top, PG=p.group, BG=power(groups), KP=width, BS=min(16, power(splits)), BC=min(64, width * p.chunk), **common,
        num_warps=p.select_warps, maxnreg=p.select_regs,
    )  # fmt: skip
    return value, stat, index


def route(launch: Launcher, q: Tensor, r: Tensor, s: int, p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs grouped by expert, the first pair of every expert, and the table of segments."""
    (b, h, n, d), m = q.shape, r.shape[2]
    blocks, int_ = -(-n // p.gate_rows), {"dtype": torch.int32, "device": q.device}
    expert = torch.empty(b * h, s, n, dtype=torch.uint8, device=q.device)
    rank = torch.empty(b * h, s, n, dtype=torch.int16, device=q.device)
    count = torch.empty(b * h, blocks, m, **int_)
    launch(
        gate_kernel, b * h * blocks,
        q, r, expert, rank, count, *q.stride()[:3], h, n, blocks, M=m, S=s, D=d, ROWS=p.gate_rows, BQ=p.gate_block, MP=p.landmarks,
        BD=p.dim, PREC=p.gate_prec, num_warps=p.gate_warps,
    )  # fmt: skip
    order, start, most = torch.empty(b, h, s * n, **int_), torch.empty(b, h, m + 1, **int_), most_segments(s * n, m)
    segment = torch.empty(b, h, most, 4, **int_)
    launch(
        permute_kernel, b * h * blocks,
        expert, rank, count, torch.empty_like(count), order, start, segment, n, blocks, most, M=m, S=s, ROWS=p.gate_rows, BB=16,
        MP=p.landmarks, LENGTH=p.length, TB=power(most / blocks), num_warps=4,
    )  # fmt: skip
    return order, start, segment


def forward(q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor | None, setting: Setting) -> tuple[Tensor, Saved]:
    """The output `[B, H, N, Dv]` and what the backward pass needs."""
    q, k, v = rows(q), rows(k), rows(v)
    (b, h, n, d), dv = q.shape, v.shape[3]
    m = setting.grid[3] * setting.grid[4] if landmarks is None else landmarks.shape[2]
    top, s, group, p = sizes(q, k, v, m, setting)
    launch = Launcher(("forward", signature(q, k, v), m, setting, p))
    r = pooled(launch, q, setting.grid, p) if landmarks is None else landmarks.contiguous()
    value, stat, index = build_experts(launch, r, k, v, top, setting, p)
    if setting.routed:
        order, start, segment = route(launch, q, r, s, p)
    else:
        order, start = (torch.empty(b, h, 0, dtype=torch.int32, device=q.device) for _ in range(2))
        segment = torch.empty(b, h, 0, 4, dtype=torch.int32, device=q.device)
    out, lse = q.new_empty(b, h, n, dv), torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    part = torch.empty(b, h, s, n, dv, dtype=torch.float32, device=q.device) if s > 1 else out
    part_lse = torch.empty(b, h, s, n, dtype=torch.float32, device=q.device) if s > 1 else lse
    segments = p.segments(s * n, m if setting.routed else 0)
    launch(
        attend_kernel, b * h * segments,
        q, k, v, r, value, index, order, segment, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        h, n, segments, segment.shape[2], setting.scale, setting.shared_scale, G=group, M=m, K=top, S=s, D=d, DV=dv,
        LENGTH=p.length, T=p.tile, BM=p.block_m, BK=p.block_k, BD=p.dim, BDV=p.dim_v, SHARED=setting.shared, ROUTED=setting.routed,
        PREC=p.prec,
        num_warps=p.attend_warps, num_stages=p.attend_stages, maxnreg=p.attend_regs,
    )  # fmt: skip
    if s > 1:
        blocks = -(-n // 64)
        launch(merge_kernel, b * h * blocks, part, part_lse, out, lse, n, blocks, S=s, DV=dv, BT=64, BDV=p.dim_v, num_warps=4)
    return out, Saved(lse, r, value, stat, index, order, start, segment)
