"""The forward pass: six launches, seven when a query reads several experts.

Once the landmarks are known, experts are built on a second stream while queries are routed: selection waits more than it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._define import power, unit_rows
from ._attend import attend_kernel, merge_kernel
from ._landmark import pool_kernel, probe_kernel
from ._launch import Recorder, find, signature
from ._plan import Plan, most_segments, plan, processors
from ._route import gate_kernel, permute_kernel
from ._select import select_kernel

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


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


def pooled(launch: Recorder, q: Tensor, grid: Sequence[int], p: Plan) -> Tensor:
    """Adaptive average of q over its token grid."""
    b, h, _, d = q.shape
    prefix, gh, gw, ph, pw = grid
    r = launch.empty(b, h, ph * pw, d, dtype=q.dtype)
    launch(
        pool_kernel, b * h * ph * pw,
        q, r, *q.stride()[:3], h, prefix, gh, gw, ph, pw, D=d, BD=p.dim, BT=p.pool_block, num_warps=4
    )  # fmt: skip
    return r


def build_experts(launch: Recorder, r: Tensor, k: Tensor, v: Tensor, top: int, setting: Setting, p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Landmark values, their softmax statistics, and the keys of every expert."""
    (b, h, m, d), n, dv = r.shape, k.shape[2], v.shape[3]
    heads, blocks, splits, group = b * h, -(-n // p.probe_block), p.probe_splits, h // k.shape[1]
    chunks, width = blocks * p.probe_block // p.chunk, power(top)
    m_s, m_r = m if setting.shared else 0, m if setting.routed else 0
    value, stat = launch.empty(b, h, m_s, dv, dtype=v.dtype), launch.empty(b, h, m_s, 2)
    of = heads * m_s * splits
    acc, top_part, sum_part = launch.empty(of, dv), launch.empty(of), launch.empty(of)
    index, list_ = (launch.empty(b, h, m_r, size, dtype=torch.int32) for size in (top, width))
    chunk_max, score = launch.empty(b, h, m_r, chunks), launch.empty(b, h, m_r, width * p.chunk)
    groups = -(-chunks // p.group)
    common = {"G": group, "M": m, "D": d, "DV": dv, "C": p.chunk, "BN": p.probe_block, "BD": p.dim, "BDV": p.dim_v,
              "SHARED": setting.shared, "ROUTED": setting.routed}  # fmt: skip
    launch(
        probe_kernel, heads * p.probe_tiles * splits,
        r, k, v, chunk_max, acc, top_part, sum_part, *k.stride()[:3], *v.stride()[:3], h, n, splits, blocks, setting.scale,
        MT=p.probe_tiles, BM=p.block_m, PREC=p.prec, **common, num_warps=4, num_stages=3 if p.probe_block == 128 else 2,
    )  # fmt: skip
    launch(
        select_kernel, heads * m,
        r, k, chunk_max, acc, top_part, sum_part, value, stat, index, list_, score, *k.stride()[:3], h, n, splits, chunks, groups,
        K=top, PG=p.group, BG=power(groups), KP=width, BS=min(16, power(splits)), BC=max(16, min(p.select_block, width * p.chunk)),
        PREC=p.prec, **common, num_warps=p.select_warps, num_stages=p.select_stages, maxnreg=p.select_regs,
    )  # fmt: skip
    return value, stat, index


def route(launch: Recorder, q: Tensor, r: Tensor, s: int, p: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs grouped by expert, the first pair of every expert, and the table of segments."""
    (b, h, n, d), m = q.shape, r.shape[2]
    blocks, most = -(-n // p.gate_rows), most_segments(s * n, m)
    expert, rank = launch.empty(b, h, s, n, dtype=torch.uint8), launch.empty(b, h, s, n, dtype=torch.int16)
    count, place = (launch.empty(b, h, blocks, m, dtype=torch.int32) for _ in range(2))
    launch(
        gate_kernel, b * h * blocks,
        q, r, expert, rank, count, *q.stride()[:3], h, n, blocks, M=m, S=s, D=d, ROWS=p.gate_rows, BQ=p.gate_block, MP=p.landmarks,
        BD=p.dim, PREC=p.gate_prec, num_warps=p.gate_warps,
    )  # fmt: skip
    order, start = launch.empty(b, h, s * n, dtype=torch.int32), launch.empty(b, h, m + 1, dtype=torch.int32)
    segment = launch.empty(b, h, most, 4, dtype=torch.int32)
    launch(
        permute_kernel, b * h * blocks,
        expert, rank, count, place, order, start, segment, n, blocks, most, M=m, S=s, ROWS=p.gate_rows, BB=16,
        MP=p.landmarks, LENGTH=p.length, TB=power(most / blocks), num_warps=4,
    )  # fmt: skip
    return order, start, segment


def attend(
    launch: Recorder, q: Tensor, k: Tensor, v: Tensor, r: Tensor, value: Tensor, experts: tuple[Tensor, Tensor, Tensor], top: int, s: int,
    setting: Setting, p: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and its log-sum-exp; `experts` are their keys, the order of the pairs and the segments."""
    (b, h, n, d), dv, m = q.shape, v.shape[3], r.shape[2]
    index, order, segment = experts
    out, lse = launch.empty(b, h, n, dv, dtype=q.dtype), launch.empty(b, h, n)
    part, part_lse = (launch.empty(b, h, s, n, dv), launch.empty(b, h, s, n)) if s > 1 else (out, lse)
    segments = p.segments(s * n, m if setting.routed else 0)
    launch(
        attend_kernel, b * h * -(-segments // p.run),
        q, k, v, r, value, index, order, segment, part, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        h, n, segments, segment.shape[2], setting.scale, setting.shared_scale, G=h // k.shape[1], M=m, K=top, S=s, D=d, DV=dv,
        LENGTH=p.length, RUN=p.run, T=p.tile, BM=p.block_m, BK=p.block_k, BD=p.dim, BDV=p.dim_v, SHARED=setting.shared,
        ROUTED=setting.routed, AHEAD=p.attend_ahead and setting.routed, PREC=p.prec, num_warps=p.attend_warps,
        num_stages=p.attend_stages, maxnreg=p.attend_regs,
    )  # fmt: skip
    if s > 1:
        blocks = -(-n // 64)
        launch(merge_kernel, b * h * blocks, part, part_lse, out, lse, n, blocks, S=s, DV=dv, BT=64, BDV=p.dim_v, num_warps=4)
    return out, lse


def forward_key(q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor | None, setting: Setting) -> Hashable:
    """What the launches of the forward pass depend on."""
    m = setting.grid[3] * setting.grid[4] if landmarks is None else landmarks.shape[2]
    given = () if landmarks is None else (landmarks,)
    return ("forward", signature(q, k, v, *given), setting, sizes(q, k, v, m, setting))


def forward(q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor | None, setting: Setting) -> tuple[Tensor, Saved]:
    """The output `[B, H, N, Dv]` and what the backward pass needs; its landmarks are those given, where there are any."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    landmarks = None if landmarks is None else landmarks.contiguous()
    inputs, key = (q, k, v) if landmarks is None else (q, k, v, landmarks), forward_key(q, k, v, landmarks, setting)
    program = find(key)
    if program is not None:
        out, *saved = program.tensors(*inputs)
        return out, Saved(*saved)
    launch = Recorder(*inputs)
    results = first_forward(launch, setting)
    launch.note(key, results, own=1)
    return results[0], Saved(*results[1:])


def first_forward(launch: Recorder, setting: Setting) -> tuple[Tensor, ...]:
    """The forward pass as Triton launches it: the output, then the fields of `Saved`."""
    q, k, v, *given = launch.inputs
    m = given[0].shape[2] if given else setting.grid[3] * setting.grid[4]
    top, s, _, p = sizes(q, k, v, m, setting)
    r = given[0] if given else pooled(launch, q, setting.grid, p)
    with launch.aside(p.fork and setting.routed):
        value, stat, index = build_experts(launch, r, k, v, top, setting, p)
    if setting.routed:
        order, start, segment = route(launch, q, r, s, p)
    else:
        order, start, segment = (launch.empty(*q.shape[:2], *none, dtype=torch.int32) for none in ((0,), (0,), (0, 4)))
    launch.join()
    out, lse = attend(launch, q, k, v, r, value, (index, order, segment), top, s, setting, p)
    return out, lse, r, value, stat, index, order, start, segment
