"""BRA by variable-length attention, the chosen regions of each region copied side by side and all heads at once, or by fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attnbench.eager import wide
from attnbench.stages import stage

from . import _segments
from ._chunks import zeros_wide
from ._regions import Regions, laid_out
from ._varlen import offsets
from .bra import choose, convolution

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .bra import BraParams

_COPIED = 1 << 22  # rows of gradients added up at a time, so that no float32 copy of all of them exists


def varlen(q: Tensor, k: Tensor, v: Tensor, params: BraParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and output: T copies of k and v."""
    b, _, n, _ = q.shape
    with stage("permute"):
        regions = Regions.of(params, n, q.device)
        order = regions.place.argsort()
    chosen = choose(q, k, regions, params)
    with stage("permute"):
        layout = _layout(chosen, regions, params.factor(q.shape[1], q.shape[3]))
        rows = q.transpose(1, 2).index_select(1, order).flatten(0, 1)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    out: Tensor = _Gathered.apply(rows, keys, values, layout)  # type: ignore[no-untyped-call]
    with stage("permute"):
        out = out.view(b, n, *out.shape[1:]).index_select(1, order.argsort()).transpose(1, 2)
    return out + convolution(v, weights, params.sides(n)) if params.lepe else out


def fused(q: Tensor, k: Tensor, v: Tensor, params: BraParams, weights: Mapping[str, Tensor]) -> Tensor:
    """The same by `attnbench.kernels.blocks`, which makes no copies."""
    from attnbench.kernels.blocks import attend_regions

    with stage("permute"):
        regions = laid_out(params, q.shape[2], q.device)
    chosen = choose(q, k, regions, params)
    with stage("permute"):
        out = attend_regions(q, k, v, chosen, regions.members, scale=params.factor(q.shape[1], q.shape[3]))
    return out + convolution(v, weights, params.sides(q.shape[2])) if params.lepe else out


class _Layout(NamedTuple):
    """Segments, one a region of a batch element, and the tokens that they read."""

    segments: _segments.Layout
    tokens: Tensor
    """`[T]` rows of the flat keys, segment after segment; rows beyond the last segment are of no use"""


def _layout(chosen: Tensor, regions: Regions, scale: float) -> _Layout:
    """Of `chosen: [B, E, T]`. Reads nothing back from the device."""
    b, n, lengths = len(chosen), len(regions.place), regions.lengths
    tokens = regions.members[chosen].flatten(1)
    present, base = tokens >= 0, n * torch.arange(b, device=tokens.device)[:, None]
    if regions.whole:
        packed = (tokens + base).flatten()
    else:
        end = tokens.numel()
        place = (present.flatten().cumsum(0) - 1).masked_fill(~present.flatten(), end)
        packed = tokens.new_zeros(end + 1).scatter_(0, place, (tokens + base).flatten())[:end]
    longest = chosen.shape[2] * regions.width
    edges = offsets(lengths.repeat(b)), offsets(lengths[chosen].sum(2).flatten())
    return _Layout(_segments.Layout(*edges, regions.width, longest, False, scale), packed)


class _Gathered(torch.autograd.Function):
    """Attention of `q: [R, H, D]` to gathered rows of `k: [T, Hkv, D]`; the copies are made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
        with stage("gather"):
            keys, values = k.index_select(0, layout.tokens), v.index_select(0, layout.tokens)
        with stage("attend"):
            out, lse = _segments.forward(q, keys, values, layout.segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (q, k, v, out, lse), (segments, tokens) = ctx.saved_tensors, ctx.layout
        keys, values = k.index_select(0, tokens), v.index_select(0, tokens)
        saved = _segments.Saved(q, keys, values, out, lse)
        if _segments.lacks(out, q):
            saved = saved._replace(slack=_segments.slack(grad, saved, segments))
        dq, dkeys, dvalues = _segments.backward(grad, saved, segments)
        return dq, _added(dkeys, tokens, segments, k), _added(dvalues, tokens, segments, v), None


def _added(grad: Tensor, tokens: Tensor, segments: _segments.Layout, like: Tensor) -> Tensor:
    """Gradients of copies added up where they came from, in at least float32."""
    total, used = zeros_wide(like), torch.arange(len(tokens), device=grad.device) < segments.cu_k[-1]
    for part, rows, live in zip(grad.split(_COPIED), tokens.split(_COPIED), used.split(_COPIED), strict=True):
        total.index_add_(0, rows, wide(part).masked_fill(~live[:, None, None], 0.0))
    return total.to(like.dtype)
