"""The backward pass: at most twelve launches, every sum in a fixed order.

With `p` the joint softmax, `G = dO`, `delta_i = G_i . o_i`: the landmarks as keys first (delta, du = sum p G and their share of dr),
then one pass over keys and values for the landmarks as probes, which completes dr; then the queries, expert by expert: dq, what the
landmarks pass on to the queries that they average, and the gradients of the expert's keys, summed a segment of the expert at a time;
last, those are added to dk and dv, list by list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .._define import power, unit_rows
from ._forward import Saved, Setting, sizes
from ._gradient import probe_grad_kernel, query_grad_kernel, routed_grad_kernel, shared_grad_kernel
from ._launch import Recorder, find, signature
from ._reduce import bins_kernel, finish_kernel, link_kernel, mark_kernel, scatter_kernel, sum_landmark_kernel, sum_probe_kernel

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch import Tensor

    from ._plan import Plan


_NO_GRID = (0, 1, 1, 1, 1)


class Shares(NamedTuple):
    """What landmarks pass on to the tokens that they average; empty where landmarks are given, or learn nothing."""

    row: Tensor
    """[B, H, M, D], for each token of a bin"""
    bins: Tensor
    """[N, words], which landmarks average a token, a bit each"""


class Parts(NamedTuple):
    """Gradients of the experts' keys and values over a segment of the expert each, in the dtype of the inputs."""

    key: Tensor
    value: Tensor
    segments: int
    """bound on the segments of a head"""


def backward_key(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, setting: Setting) -> Hashable:
    """What the launches of the backward pass depend on."""
    return ("backward", signature(grad, q, k, v, out, *saved), setting, sizes(q, k, v, saved.r.shape[2], setting))


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, setting: Setting) -> list[Tensor]:
    """[dq, dk, dv, dr]; dr, in float32, includes what pooling passes on to dq."""
    grad, q, k, v = unit_rows(grad), unit_rows(q), unit_rows(k), unit_rows(v)
    out, saved = out.contiguous(), Saved(*(x.contiguous() for x in saved))
    key = backward_key(grad, q, k, v, out, saved, setting)
    program = find(key)
    if program is not None:
        return program.tensors(grad, q, k, v, out, *saved)
    launch = Recorder(grad, q, k, v, out, *saved)
    results = first_backward(launch, setting)
    # pooled landmarks ask for no gradient of their own
    launch.note(key, results, own=3 if setting.grid else 4)
    return results


def first_backward(launch: Recorder, setting: Setting) -> list[Tensor]:
    """The backward pass as Triton launches it: dq, dk, dv and dr."""
    grad, q, k, v, out, *rest = launch.inputs
    saved = Saved(*rest)
    (b, h, n, d), m = q.shape, saved.r.shape[2]
    top, s, group, p = sizes(q, k, v, m, setting)
    common = {"G": group, "M": m, "D": d, "DV": v.shape[3], "BD": p.dim, "BDV": p.dim_v, "PREC": p.prec}
    delta = launch.empty(b, h, n)
    if setting.shared:
        dk, dv, dr, share = landmark_grad(launch, grad, q, k, v, out, saved, delta, setting, p, common)
    else:
        dk, dv = (launch.zeros(*x.shape, dtype=x.dtype) for x in (k, v))
        # landmarks get no gradient through the selection; pooled ones need none written
        dr = (launch.empty if setting.grid else launch.zeros)(*saved.r.shape)
        share = Shares(launch.empty(b, h, 0, d, dtype=q.dtype), launch.empty(0, dtype=torch.int32))
    dq, parts = query_grad(launch, grad, q, k, v, out, saved, delta, share, setting, top, s, p, common)
    if setting.routed:
        if not p.fused:
            routed_grad(launch, grad, q, k, v, saved, delta, parts, setting, top, s, p, common)
        scatter(launch, k, v, dk, dv, saved, parts, top, p, common)
    return [finish(launch, dq, q, share, setting, s, p) if s > 1 else dq, dk, dv, dr]


def query_grad(
    launch: Recorder, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, delta: Tensor, share: Shares,
    setting: Setting, top: int, s: int, p: Plan, common: Mapping[str, object],
) -> tuple[Tensor, Parts]:  # fmt: skip
    """dq, one part a slot, and where an expert's keys fit one tile their gradients; `delta` is written where nothing is shared."""
    (b, h, n, d), m = q.shape, saved.r.shape[2]
    dq = launch.empty(b, h, s * n, d, dtype=torch.float32 if s > 1 else q.dtype)
    segments = p.segments(s * n, m if setting.routed else 0)
    size = b * h * segments * top if setting.routed else 0
    parts = Parts(launch.empty(size, d, dtype=k.dtype), launch.empty(size, v.shape[3], dtype=v.dtype), segments)
    launch(
        query_grad_kernel, b * h * segments,
        grad, q, k, v, out, saved.lse, delta, saved.r, saved.value, share.row, share.bins, saved.index, saved.order, saved.segment, dq,
        parts.key, parts.value, *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, segments,
        saved.segment.shape[2], setting.scale, setting.shared_scale, K=top, S=s,
        LENGTH=p.length, T=p.grad_tile, BM=p.block_m, BK=p.block_k, SHARED=setting.shared, ROUTED=setting.routed,
        KEYS=setting.routed and p.fused, POOLED=share.row.numel() > 0 and s == 1, **common,
        num_warps=p.query_warps, num_stages=p.query_stages, maxnreg=p.query_regs,
    )  # fmt: skip
    return dq, parts


def landmark_grad(
    launch: Recorder, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Saved, delta: Tensor, setting: Setting, p: Plan,
    common: Mapping[str, object],
) -> tuple[Tensor, Tensor, Tensor, Shares]:  # fmt: skip
    """dk and dv through the landmark values, dr, and the pooled tokens' shares of it; writes `delta`."""
    (b, h, n, d), m, dv = q.shape, saved.r.shape[2], v.shape[3]
    heads, kv_heads, keys, parts, group = b * h, b * k.shape[1], k.shape[2], -(-n // p.stream), h // k.shape[1]
    part_r, part_u = (launch.empty(heads * parts * m, width) for width in (d, dv))
    launch(
        shared_grad_kernel, heads * p.probe_tiles * parts,
        grad, q, out, saved.lse, delta, saved.r, saved.value, part_r, part_u, *grad.stride()[:3], *q.stride()[:3], h, n, parts,
        setting.shared_scale, MT=p.probe_tiles, ROWS=p.stream, T=p.grad_tile, BM=p.block_m,
        **{key: x for key, x in common.items() if key != "G"},
        num_warps=p.grad_warps, num_stages=2,
    )  # fmt: skip
    u, u_delta, dr = launch.empty(*saved.value.shape, dtype=v.dtype), launch.empty(heads, m), launch.empty(b, h, m, d)
    widths = {key: common[key] for key in ("D", "DV", "BD", "BDV")}
    launch(
        sum_landmark_kernel, heads * m, part_r, part_u, saved.value, saved.stat, u, u_delta, dr, parts, M=m, BP=16, **widths, num_warps=2
    )
    dk, dv_ = (launch.empty(*x.shape, dtype=x.dtype) for x in (k, v))
    blocks = -(-keys // p.key_block)
    splits, once = min(blocks, p.key_splits), p.probe_tiles == 1 and group == 1
    part = launch.empty(heads * (splits if once else p.probe_splits) * m, d)
    strides = (*k.stride()[:3], *v.stride()[:3])
    tail = {"MT": p.probe_tiles, "BM": p.block_m, "BN": p.key_block, **common, "num_warps": p.grad_warps, "num_stages": 2}
    launch(
        probe_grad_kernel, kv_heads * splits,
        saved.r, k, v, u, u_delta, saved.stat, dk, dv_, part, *strides, h, keys, splits, blocks, setting.scale,
        KEYS=True, PROBES=once, **tail,
    )  # fmt: skip
    if not once:
        splits = min(blocks, p.probe_splits)
        launch(
            probe_grad_kernel, heads * p.probe_tiles * splits,
            saved.r, k, v, u, u_delta, saved.stat, dk, dv_, part, *strides, h, keys, splits, blocks, setting.scale, KEYS=False, PROBES=True,
            **tail,
        )  # fmt: skip
    share = Shares(
        launch.empty(b, h, m if setting.grid else 0, d, dtype=q.dtype),
        launch.empty(n if setting.grid else 0, -(-m // 32), dtype=torch.int32),
    )
    launch(
        sum_probe_kernel, heads * m, part, dr, share.row, splits, *(setting.grid or _NO_GRID)[1:], M=m, D=d, BD=p.dim, BP=16,
        POOLED=bool(setting.grid), num_warps=2,
    )  # fmt: skip
    if setting.grid:
        launch(bins_kernel, -(-n // 128), share.bins, n, *setting.grid, M=m, BT=128, num_warps=4)
    return dk, dv_, dr, share


def routed_grad(
    launch: Recorder, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, delta: Tensor, parts: Parts, setting: Setting,
    top: int, s: int, p: Plan, common: Mapping[str, object],
) -> None:  # fmt: skip
    """Gradients of the experts' keys and values where they take several tiles."""
    (b, h, n, _), tiles = q.shape, -(-top // p.block_k)
    launch(
        routed_grad_kernel, b * h * parts.segments * tiles,
        grad, q, k, v, saved.lse, delta, saved.index, saved.order, saved.segment, parts.key, parts.value, *grad.stride()[:3],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, parts.segments, saved.segment.shape[2], setting.scale, K=top, S=s,
        KT=tiles, T=p.grad_tile, BK=p.block_k, **common, num_warps=p.grad_warps, num_stages=2,
    )  # fmt: skip


def scatter(
    launch: Recorder, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, saved: Saved, parts: Parts, top: int, p: Plan,
    common: Mapping[str, object],
) -> None:  # fmt: skip
    """Add the gradients of the experts' keys and values to dk and dv."""
    (b, h, m), kv_heads = saved.r.shape[:3], k.shape[0] * k.shape[1]
    lists, n = h // k.shape[1] * m, k.shape[2]
    words, pairs, step = -(-lists // 32), lists * top, 16
    mask = launch.zeros(kv_heads, n, words, dtype=torch.int32)
    segment, link = launch.empty(b * h, m + 1, dtype=torch.int32), launch.empty(kv_heads, pairs, dtype=torch.int32)
    consts = {"LISTS": lists, "WORDS": words, "K": top, "KP": power(top), "num_warps": 1}
    launch(mark_kernel, kv_heads * lists, saved.index, saved.start, mask, segment, n, LENGTH=p.length, M=m, MP=p.landmarks, **consts)
    launch(link_kernel, kv_heads * lists, saved.index, mask, link, n, **consts)
    widths = {name: common[name] for name in ("G", "D", "DV", "BD", "BDV")}
    blocks = -(-pairs // step)
    launch(
        scatter_kernel, kv_heads * blocks,
        parts.key, parts.value, saved.index, link, segment, dk, dv, n, blocks, parts.segments, M=m, K=top, PAIRS=pairs, BP=step, **widths,
        num_warps=4,
    )  # fmt: skip


def finish(launch: Recorder, dq: Tensor, q: Tensor, share: Shares, setting: Setting, s: int, p: Plan) -> Tensor:
    """Sum the slots of dq and add what comes through pooling."""
    b, h, n, d = q.shape
    out, blocks = launch.empty(b, h, n, d, dtype=q.dtype), -(-n // p.finish_block)
    launch(
        finish_kernel, b * h * blocks, dq, share.row, share.bins, out, n, blocks, S=s, M=share.row.shape[2], BM=p.block_m, D=d, BD=p.dim,
        BT=p.finish_block, POOLED=share.row.numel() > 0, PREC=p.prec, num_warps=4,
    )  # fmt: skip
    return out
