"""NSA in practice: compressed scores in chunks of queries, selected blocks as segments, windows by a kernel that has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from attnbench.eager import masked_softmax, wide
from attnbench.stages import stage

from ._blocks import own_part, routed_part
from ._chunks import row_chunks, wide_scores, zeros_wide
from ._nsa_compress import compressed, ends
from ._nsa_select import choose
from ._varlen import merged_attention
from ._window_chunked import chunked
from ._window_flash import flash

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .nsa import NsaParams

_COPIES = 4
"""float32 tensors of the size of a chunk's scores that are alive at once"""


def varlen(q: Tensor, k: Tensor, v: Tensor, params: NsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and three outputs: the chosen blocks, one chunk of scores."""
    with stage("pool" if params.phi == "mean" else "project"):
        keys, values = compressed(k, v, params, weights)
    first, chosen = _Compressed.apply(q, keys, values, _Task(k.shape[2], params))  # type: ignore[no-untyped-call]
    return combined(q, weights["gate"], (first, _selected(q, k, v, chosen, params), window(q, k, v, params)))


def fused(q: Tensor, k: Tensor, v: Tensor, params: NsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """The same by `attnbench.kernels.compress`, which chooses too, and `attnbench.kernels.blocks`. Nothing is read back."""
    from attnbench.kernels.blocks import attend_blocks
    from attnbench.kernels.compress import Selection, attend_compressed

    p = params
    with stage("pool" if p.phi == "mean" else "project"):
        keys, values = compressed(k, v, p, weights)
    with stage("attend"):
        selection = Selection(k.shape[2], p.compress, p.stride, p.block, p.topk, p.first, p.local, p.causal)
        first, chosen = attend_compressed(q, keys, values, selection)
    with stage("permute"):
        second = attend_blocks(q, k, v, chosen, params.block, causal=params.causal)
    return combined(q, weights["gate"], (first, second, window(q, k, v, params)))


def combined(q: Tensor, gate: Tensor, branches: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The branches, `[B, H, N, Dv]` each, summed with their gates."""
    with stage("project"):
        logits = linear(q.transpose(1, 2).flatten(2), gate.flatten(0, 1))
        factors = wide(logits).sigmoid().unflatten(2, gate.shape[:2]).transpose(1, 2)
    out: Tensor = _Gated.apply(factors, *branches)  # type: ignore[no-untyped-call]
    return out


def window(q: Tensor, k: Tensor, v: Tensor, params: NsaParams) -> Tensor:
    """The window branch: flash attention where it takes these tensors."""
    half, fits = q.is_cuda and q.element_size() == 2, q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if not (half and fits):
        return chunked(q, k, v, params.windowed)
    return flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), params.windowed).transpose(1, 2)


def _selected(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, params: NsaParams) -> Tensor:
    """The selected branch. Causal, the query's own block is a part of its own."""
    with stage("permute"):
        parts = []
        if params.causal:
            own = torch.arange(q.shape[2], device=q.device)[:, None] // params.block
            parts, chosen = [own_part(q, k, v, params.block)], chosen.masked_fill(chosen == own, -1)
        routes = chosen.repeat_interleave(q.shape[1] // k.shape[1], 1)
        parts.append(routed_part(routes, k, v, params.block))
    out = merged_attention(q.reshape(-1, q.shape[3]), parts, q.shape[3] ** -0.5)
    return out.view(*q.shape[:3], v.shape[3])


class _Task(NamedTuple):
    """What the compressed branch is about, beside its tensors."""

    keys: int
    """tokens that were compressed"""
    params: NsaParams


class _Compressed(torch.autograd.Function):
    """The compressed branch `[B, H, N, Dv]`, and the selection blocks `[B, Hkv, N, S]` that its probabilities choose."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        out, chosen = q.new_empty(*q.shape[:3], v.shape[3]), []
        for rows in row_chunks(q, _row_bytes(q, k)):
            with stage("attend"):
                p = _probabilities(q, k, rows, task)
                out[:, :, rows] = (_stacked(p.to(v.dtype), v) @ v[:, :, : p.shape[3]]).view(out[:, :, rows].shape)
            with stage("route"):
                places = torch.arange(rows.start, rows.stop, device=q.device)
                chosen.append(choose(p, places, k.shape[1], task.keys, task.params).to(torch.int32))
        blocks = torch.cat(chosen, 2)
        ctx.save_for_backward(q, k, v)
        ctx.task = task
        ctx.mark_non_differentiable(blocks)
        return out, blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _blocks: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv, scale = torch.empty_like(q), zeros_wide(k), zeros_wide(v), q.shape[-1] ** -0.5
        for rows in row_chunks(q, _row_bytes(q, k)):
            p = _probabilities(q, k, rows, ctx.task)
            seen, query, upstream = slice(0, p.shape[3]), _stacked(q[:, :, rows], k), _stacked(grad[:, :, rows], v)
            dp = wide_scores(grad[:, :, rows], v[:, :, seen])
            ds = _stacked((scale * p * (dp - (p * dp).sum(-1, keepdim=True))).to(q.dtype), k)
            dq[:, :, rows] = (ds @ k[:, :, seen]).view(dq[:, :, rows].shape)
            dk[:, :, seen] += ds.mT @ query
            dv[:, :, seen] += _stacked(p.to(v.dtype), v).mT @ upstream
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _probabilities(q: Tensor, k: Tensor, rows: slice, task: _Task) -> Tensor:
    """`[B, H, R, C']` of a run of queries, C' the compressed blocks that any of them sees, at least 1."""
    params, last = task.params, ends(task.keys, task.params, q.device)
    if not params.causal:
        return masked_softmax(q.shape[-1] ** -0.5 * wide_scores(q[:, :, rows], k))
    count = max(1, min(len(last), (rows.stop - params.compress) // params.stride + 1))
    visible = last[:count] <= torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    return masked_softmax(q.shape[-1] ** -0.5 * wide_scores(q[:, :, rows], k[:, :, :count]), visible)


def _stacked(x: Tensor, k: Tensor) -> Tensor:
    """`[B, H, R, X]` -> `[B, Hkv, H / Hkv R, X]`: the query heads of a group one below the other."""
    return x.reshape(*k.shape[:2], -1, x.shape[3])


def _row_bytes(q: Tensor, k: Tensor) -> int:
    """Bytes of a query's scores."""
    return _COPIES * q.shape[0] * q.shape[1] * k.shape[2] * wide(q[..., :0]).element_size()


class _Gated(torch.autograd.Function):
    """`sum_c factors[..., c] branch_c`, added up in at least float32: `factors: [B, H, N, 3]`."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, *branches: Tensor) -> Tensor:
        with stage("merge"):
            total = factors[..., :1] * branches[0]
            for c, branch in enumerate(branches[1:], 1):
                total.addcmul_(factors[..., c : c + 1], branch)
        ctx.save_for_backward(factors, *branches)
        return total.to(branches[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        factors, *branches = ctx.saved_tensors
        dfactors = torch.stack([(grad * branch).sum(-1, dtype=factors.dtype) for branch in branches], -1)
        return dfactors, *((factors[..., c : c + 1] * grad).to(grad.dtype) for c in range(len(branches)))
