"""Launches, and the operator as torch sees it: two custom ops, shapes for tracing, and the gradient that links them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._define import define, on_device, unit_rows
from ._keys import delta_kernel, key_gradient_kernel, key_sum_kernel
from ._pairs import merge_kernel, pair_attend_kernel, pair_query_gradient_kernel, sum_kernel
from ._plan import Plan, plan, region_tile
from ._regions import region_attend_kernel, region_query_gradient_kernel
from ._sort import group, items

PART_BYTES = 1 << 31
"""bytes that partial outputs or gradients may take: heads are done in several launches where they would take more"""


class Call(NamedTuple):
    """Sizes of one call."""

    heads: int
    kv_heads: int
    route_heads: int
    n: int
    keys: int
    blocks: int
    width: int
    """keys of a block"""
    slots: int
    """blocks that a query, or a region, reads"""
    dim: int
    dim_v: int
    batch: int
    low: bool
    """whether what rounding the output took away is kept for the backward pass"""

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor | None, width: int) -> Call:
        """Of a call of the operator."""
        blocks = -(-k.shape[2] // width) if members is None else members.shape[0]
        return cls(
            q.shape[1], k.shape[1], routes.shape[1], q.shape[2], k.shape[2], blocks, width, routes.shape[3], q.shape[3], v.shape[3],
            q.shape[0], q.dtype != torch.float32,
        )  # fmt: skip

    def plan(self, pairs: int) -> Plan:
        """Launch sizes."""
        return plan(pairs, self.blocks, self.width, self.dim, self.dim_v, not self.low)

    def constants(self, p: Plan) -> dict[str, Any]:
        """Constants of every kernel that attends."""
        return {"G": self.heads // self.kv_heads, "S": self.slots, "W": self.width, "D": self.dim, "DV": self.dim_v, "BK": p.block,
                "BD": p.dim, "BDV": p.dim_v, "PREC": p.prec}  # fmt: skip


def passes(c: Call, dim: int) -> list[tuple[int, int]]:
    """(first head, heads) of each launch whose partial results of `dim` columns fit the budget."""
    total = c.batch * c.heads
    step = max(1, min(total, PART_BYTES // (4 * c.n * c.slots * dim)))
    return [(first, min(step, total - first)) for first in range(0, total, step)]


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=x.device)


def pair_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, c: Call, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, remainder, log-sum-exp, order and start."""
    pairs = c.n * c.slots
    p = c.plan(pairs)
    order, start = group(routes, c.blocks)
    most = p.items(pairs, c.blocks)
    table, _ = items(start, p.run, most)
    single = c.slots == 1
    make = torch.zeros if single else torch.empty  # a query without a block is written by the kernel that merges
    out = make(c.batch, c.heads, c.n, c.dim_v, dtype=q.dtype, device=q.device)
    low = torch.zeros_like(out) if c.low and single else torch.empty_like(out) if c.low else out.new_empty(0)
    lse = _empty(q, c.batch, c.heads, c.n)
    if single:
        lse.fill_(float("inf"))
    for first, heads in passes(c, c.dim_v):
        part = out.view(-1, c.n, c.dim_v)[first:] if single else _empty(q, heads, pairs, c.dim_v)
        part_lse = lse.view(-1, c.n)[first:] if single else _empty(q, heads, pairs)
        part_low = low.view(-1, c.n, c.dim_v)[first:] if c.low and single else low
        pair_attend_kernel[(heads * most,)](
            q, k, v, order, table, part, part_low, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            c.heads, c.route_heads, c.n, c.keys, most, first, scale, T=p.tile, CAUSAL=causal, LOW=c.low and single,
            **c.constants(p), num_warps=p.warps, num_stages=2,
        )  # fmt: skip
        if not single:
            tiles = -(-c.n // p.rows)
            merge_kernel[(heads * tiles,)](
                part, part_lse, routes, out, low, lse, c.heads, c.route_heads, c.n, tiles, first,
                S=c.slots, DV=c.dim_v, BT=p.rows, BDV=p.dim_v, LOW=c.low, num_warps=4,
            )  # fmt: skip
    return out, low, lse, order, start


def region_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor, c: Call, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, remainder and log-sum-exp."""
    p, tile = c.plan(c.blocks * c.slots), region_tile(c.width, not c.low)
    out, lse = q.new_empty(c.batch, c.heads, c.n, c.dim_v), _empty(q, c.batch, c.heads, c.n)
    low, tiles = torch.empty_like(out) if c.low else out.new_empty(0), -(-c.width // tile)
    region_attend_kernel[(c.batch * c.heads * c.blocks * tiles,)](
        q, k, v, routes, members, out, low, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        c.heads, c.n, c.blocks, tiles, scale, T=tile, CAUSAL=causal, LOW=c.low, **c.constants(p), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, low, lse


def query_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, routes: Tensor, members: Tensor | None,
    order: Tensor, start: Tensor, c: Call, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """dq."""
    strides = (*grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    dq = q.new_empty(q.shape)
    if members is not None:
        p, tile = c.plan(c.blocks * c.slots), region_tile(c.width, not c.low)
        tiles = -(-c.width // tile)
        region_query_gradient_kernel[(c.batch * c.heads * c.blocks * tiles,)](
            grad, q, k, v, lse, delta, routes, members, dq, *strides, c.heads, c.n, c.blocks, tiles, scale,
            T=tile, CAUSAL=causal, **c.constants(p), num_warps=p.grad_warps, num_stages=2,
        )  # fmt: skip
        return dq
    pairs = c.n * c.slots
    p = c.plan(pairs)
    most = p.items(pairs, c.blocks)
    table, _ = items(start, p.run, most)
    for first, heads in passes(c, c.dim):
        part = _empty(q, heads, pairs, c.dim)
        pair_query_gradient_kernel[(heads * most,)](
            grad, q, k, v, lse, delta, order, table, part, *strides, c.heads, c.route_heads, c.n, c.keys, most, first, scale,
            T=p.tile, CAUSAL=causal, **c.constants(p), num_warps=p.query_warps, num_stages=2,
        )  # fmt: skip
        tiles = -(-c.n // p.rows)
        sum_kernel[(heads * tiles,)](
            part, routes, dq, c.heads, c.route_heads, c.n, tiles, first, S=c.slots, D=c.dim, BT=p.rows, BD=p.dim, num_warps=4,
        )  # fmt: skip
    return dq


def key_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, members: Tensor | None,
    order: Tensor, start: Tensor, c: Call, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv."""
    pairs = (c.n if members is None else c.blocks) * c.slots
    p, spread, regions = c.plan(pairs), max(1, c.kv_heads // c.route_heads), members is not None
    most, tiles, heads = p.grad_items(pairs, c.blocks), -(-c.width // p.block), c.batch * c.route_heads
    table, edges = items(start, p.grad_run, most)
    tokens = order if members is None else members
    part_k, part_v = (_empty(q, heads * most * spread, c.width, dim) for dim in (c.dim, c.dim_v))
    key_gradient_kernel[(heads * most * spread * tiles,)](
        grad, q, k, v, lse, delta, order, table, tokens, part_k, part_v,
        *grad.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        c.heads, c.route_heads, c.n, c.keys, pairs, most, tiles, scale, C=spread, T=p.grad_tile, REGIONS=regions, CAUSAL=causal,
        **c.constants(p), num_warps=p.grad_warps, num_stages=2,
    )  # fmt: skip
    found = []
    for like, part, dim, padded in ((k, part_k, c.dim, p.dim), (v, part_v, c.dim_v, p.dim_v)):
        dx = like.new_empty(like.shape)
        key_sum_kernel[(c.batch * c.kv_heads * c.blocks * tiles,)](
            part, edges, tokens, dx, c.kv_heads, c.route_heads, c.keys, c.blocks, most, tiles,
            R=max(1, c.route_heads // c.kv_heads), C=spread, W=c.width, D=dim, BK=p.block, BD=padded, REGIONS=regions, num_warps=4,
        )  # fmt: skip
        found.append(dx)
    return found[0], found[1]


@define("blocks_forward")
def blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor | None, width: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output; what rounding took from it; its log-sum-exp; pairs sorted by block, and where each block's begin."""
    q, k, v, c = unit_rows(q), unit_rows(k), unit_rows(v), Call.of(q, k, v, routes, members, width)
    with on_device(q):
        if members is None:
            return pair_forward(q, k, v, routes, c, scale, causal)
        none = routes.new_empty(0)
        return (*region_forward(q, k, v, routes, members, c, scale, causal), none, torch.empty_like(none))


@torch.library.register_fake(blocks_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor | None, width: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    c = Call.of(q, k, v, routes, members, width)
    out = q.new_empty(c.batch, c.heads, c.n, c.dim_v)
    order = routes.new_empty(routes.numel() if members is None else 0)
    start = routes.new_empty((c.batch * c.route_heads, c.blocks + 1) if members is None else (0,))
    low = torch.empty_like(out) if c.low else out.new_empty(0)
    return out, low, q.new_empty(out.shape[:3], dtype=torch.float32), order, start


@define("blocks_backward", final=True)
def blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor | None, saved: list[Tensor],
    width: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grad, q, k, v, c = unit_rows(grad), unit_rows(q), unit_rows(k), unit_rows(v), Call.of(q, k, v, routes, members, width)
    out, low, lse, order, start = saved
    delta, p = torch.empty_like(lse), c.plan(c.n * c.slots)
    with on_device(q):
        tiles = -(-c.n // p.rows)
        delta_kernel[(c.batch * c.heads * tiles,)](
            grad, out, low, delta, *grad.stride()[:3], c.heads, c.n, tiles, DV=c.dim_v, BT=p.rows, BDV=p.dim_v, LOW=c.low, num_warps=4
        )
        if members is not None:
            order, start = group(routes, c.blocks)
        dq = query_gradient(grad, q, k, v, lse, delta, routes, members, order, start, c, scale, causal)
        return dq, *key_gradients(grad, q, k, v, lse, delta, members, order, start, c, scale, causal)


@torch.library.register_fake(blocks_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, routes: Tensor, members: Tensor | None, saved: list[Tensor],
    width: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, routes, members, *ctx.setting = inputs
    ctx.members = members is not None
    ctx.save_for_backward(q, k, v, routes, *([members] if ctx.members else []), *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (2 + len(ctx.setting))
    if grad is None:
        return None, None, None, *none
    q, k, v, routes, *rest = ctx.saved_tensors
    members = rest.pop(0) if ctx.members else None
    return *blocks_backward(grad, q, k, v, routes, members, rest, *ctx.setting), *none


torch.library.register_autograd(blocks_forward, _gradient, setup_context=_save)
