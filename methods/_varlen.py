"""Softmax over the union of several sets of keys, each attended on its own as variable-length segments.

A query row takes part in any number of parts; with `l_p` and `o_p` the log-sum-exp and the output of part p,
`l = log sum_p exp(l_p)` and `o = sum_p exp(l_p - l) o_p`. Each part's backward pass runs with the merged `l` and `o`, which is exact.
A key that reaches a query through two parts counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attnbench.eager import wide
from attnbench.stages import stage

from . import _segments
from ._slots import Rows, add_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnbench.method import Params, Shape

_MAX_SEGMENTS = 65535  # the flash kernels put segments on the second axis of a CUDA grid


@dataclass(frozen=True)
class Part:
    """One set of segments. Make it with `make_part`, which drops segments without queries: flash attention forbids them."""

    entries: Tensor | None
    """`[R']` in segment order, each at most once: entry `row * slots + slot` is a row of the flat queries; None: all rows as they are"""
    k: Tensor
    """`[T, D]` keys in segment order"""
    v: Tensor
    """`[T, Dv]`"""
    cu_q: Tensor
    """`[S + 1]` int32, first entry of `q_rows` of each segment, then their number"""
    cu_k: Tensor
    """`[S + 1]` int32, the same for keys"""
    max_q: int
    """at least the longest run of queries"""
    max_k: int
    """at least the longest run of keys"""
    causal: bool = False
    """query t of a segment reads its first t + 1 keys; each segment then has as many keys as queries"""
    slots: int = 1
    """segments that a row reads at most"""


def group_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by their expert, and the rows each expert has: `(order [R], counts [experts])` of `ids: [R]`.

    Rows keep their order inside an expert. An id of `experts` means none: such rows come last and are not counted.
    """
    compact = torch.int16 if experts < 1 << 15 else torch.int32  # a radix sort takes as many passes as there are bits
    ordered, order = ids.to(compact).sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(experts + 1, dtype=compact, device=ids.device))
    return order, edges.diff()


def offsets(counts: Tensor) -> Tensor:
    """`[S]` lengths -> `[S + 1]` int32 offsets."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def make_part(entries: Tensor, counts_q: Tensor, k: Tensor, v: Tensor, counts_k: Tensor, *, causal: bool = False, slots: int = 1) -> Part:
    """A part of S segments of `counts_q: [S]` queries and `counts_k: [S]` keys; segments without queries are left out.

    `entries` beyond the sum of `counts_q` is ignored. Reads sizes back from the device: one synchronisation, and a second one
    and a copy of the keys where a segment is left out.
    """
    used = counts_q > 0
    rows, kept, max_q, max_k = torch.stack([counts_q.sum(), used.sum(), counts_q.max(), counts_k.max()]).tolist()
    if kept < len(counts_q):
        held = used.repeat_interleave(counts_k, output_size=k.shape[0]).nonzero()[:, 0]
        k, v, counts_q, counts_k = k.index_select(0, held), v.index_select(0, held), counts_q[used], counts_k[used]
    return Part(entries[:rows], k, v, offsets(counts_q), offsets(counts_k), max_q, max_k, causal, slots)


def merged_attention(q: Tensor, parts: Sequence[Part], scale: float | Sequence[float]) -> Tensor:
    """Softmax attention of `q: [R, D]` over the union of what each row reads in `parts` -> `[R, Dv]`, zero where it reads nothing.

    `scale` is one factor of q . k, or one a part. Differentiable in q and in the keys and values of each part.
    A row that reads several segments of one part has a slot for each.
    """
    scales = [scale] * len(parts) if isinstance(scale, (int, float)) else list(scale)
    tensors = [x for part in parts for x in (part.k, part.v)]
    with stage("permute"):
        rows = [Rows.of(part.entries, part.slots, len(q)) for part in parts]
    layouts = [_segments.Layout(p.cu_q, p.cu_k, p.max_q, p.max_k, p.causal, s) for p, s in zip(parts, scales, strict=True)]
    out: Tensor = _MergedAttention.apply(q, rows, layouts, *tensors)  # type: ignore[no-untyped-call]
    return out


def varlen_reasons(shape: Shape, _params: Params, dtype: torch.dtype, device: str) -> list[str]:
    """Why flash attention over segments cannot run on a device; nothing is amiss on a CPU."""
    if device != "cuda":
        return []
    half = dtype in (torch.float16, torch.bfloat16)
    found = [] if half else [f"variable-length flash attention takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"]
    widest = max(shape.dim, shape.dim_v)
    return found + ([f"variable-length flash attention takes head dimensions up to 256, not {widest}"] if widest > 256 else [])


def segment_reasons(segments: int, device: str) -> list[str]:
    """Why so many segments are too many for one part."""
    if device != "cuda" or segments <= _MAX_SEGMENTS:
        return []
    return [f"{segments} segments (batch x heads x experts) exceed the {_MAX_SEGMENTS} of one flash attention call"]


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, rows: list[Rows], layouts: list[_segments.Layout], *tensors: Tensor) -> Tensor:
        outputs, shares = [], []
        for row, layout, k, v in zip(rows, layouts, tensors[::2], tensors[1::2], strict=True):
            with stage("permute"):
                q_part = row.take(q)
            with stage("attend"):
                o, lse = _attend(q_part, k, v, layout)
            with stage("merge"):
                outputs.append(o)
                shares.append(row.shares(lse))
        with stage("merge"):
            share = torch.cat(shares, 1)
            total = share.logsumexp(1)
            total.masked_fill_(total == float("-inf"), float("inf"))  # rows that read nothing: exp(s - total) is 0
            weights = share.sub_(total[:, None]).exp_().split([x.shape[1] for x in shares], 1)
            out = add_up(q.new_empty(len(q), tensors[1].shape[1], dtype=_segments.kept_dtype(q)), outputs, rows, weights)
        ctx.save_for_backward(q, out, total, *tensors)
        ctx.rows, ctx.layouts = rows, layouts
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, *tensors = ctx.saved_tensors
        parts = list(zip(ctx.rows, ctx.layouts, tensors[::2], tensors[1::2], strict=True))
        kept = _Kept(grad, q, out, lse)
        if _segments.lacks(out, q):
            found = [_segments.slack(*kept.of(part), part[1]) if part[1].max_q else lse[:0, None] for part in parts]
            kept = kept._replace(slack=add_up(lse.new_empty(len(q), 1), found, ctx.rows))
        dq_parts, grads = [], []
        for part in parts:
            _, layout, k, v = part
            if layout.max_q:
                dq, dk, dv = (x.squeeze(1) for x in _segments.backward(*kept.of(part), layout))
            else:
                dq, dk, dv = q.new_empty(0, q.shape[1]), torch.zeros_like(k), torch.zeros_like(v)
            dq_parts.append(dq)
            grads += [dk, dv]
        return (add_up(torch.empty_like(q), dq_parts, ctx.rows), None, None, *grads)


class _Kept(NamedTuple):
    """What the backward pass has of each row."""

    grad: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor
    slack: Tensor | None = None

    def of(self, part: tuple[Rows, _segments.Layout, Tensor, Tensor]) -> tuple[Tensor, _segments.Saved]:
        """The gradient of the output, and what else a part needs, in its order of rows."""
        rows, _, k, v = part
        grad, q, out = (rows.take(x).unsqueeze(1) for x in (self.grad, self.q, self.out))
        slack = None if self.slack is None else rows.take(self.slack)
        return grad, _segments.Saved(q, k.unsqueeze(1), v.unsqueeze(1), out, rows.take(self.lse)[None], slack)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: _segments.Layout) -> tuple[Tensor, Tensor]:
    """Output `[R', Dv]` and log-sum-exp `[R']` of one part."""
    if not layout.max_q:
        return v.new_empty(0, v.shape[1]), wide(q.new_empty(0))
    out, lse = _segments.forward(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), layout)
    return out.squeeze(1), lse[0]
