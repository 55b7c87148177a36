"""Attention inside segments: query rows and key rows lie segment after segment, and a query reads the keys of its own segment.

Rows hold all heads, `[R, H, D]`, which share the segments.
On CUDA this is torch's variable-length flash attention, called through its operators because the log-sum-exp is needed and the
backward pass must accept one that was merged with that of other segments. Elsewhere it is a loop, in any float dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from attnbench.eager import wide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


_WIDEST = 256
"""head dimensions of flash attention"""


class Layout(NamedTuple):
    """Where segments begin and end, and how they are attended."""

    cu_q: Tensor
    """`[S + 1]` int32, first query row of each segment, then the number of rows"""
    cu_k: Tensor
    """`[S + 1]` int32, the same for keys"""
    max_q: int
    """at least the longest run of queries"""
    max_k: int
    """at least the longest run of keys"""
    causal: bool
    """query t of a segment reads its first t + 1 keys; the segment then has as many keys as queries"""
    scale: float
    """factor of q . k"""


class Saved(NamedTuple):
    """What the backward pass of a segment needs."""

    q: Tensor
    """`[R, H, D]`"""
    k: Tensor
    """`[T, Hkv, D]`"""
    v: Tensor
    """`[T, Hkv, Dv]`"""
    out: Tensor
    """`[R, H, Dv]`, of the softmax over these keys and any others, of `kept_dtype`"""
    lse: Tensor
    """`[H, R]`, likewise; +inf where a row reads nothing"""
    slack: Tensor | None = None
    """`[R, H]`, what `grad . out` lacks since the output was rounded; None where it lacks nothing"""


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output `[R, H, Dv]` and log-sum-exp `[H, R]`, -inf where a segment has no keys, of `q: [R, H, D]` and `k: [T, Hkv, D]`.

    The output of flash attention is of the type of q, that of the loop wide.
    """
    return _flash_forward(q, k, v, layout) if q.is_cuda else _loop_forward(q, k, v, layout)


def backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With `p = exp(scale q.k - lse)` and `delta = grad . out + slack`: `dv = p^T grad`, `ds = p (grad v^T - delta)`. The slack becomes a
    channel of the output where the gradient is 1 and values are 0.
    """
    run = _flash_backward if grad.is_cuda else _loop_backward
    if saved.slack is None:
        return run(grad, saved, layout)
    out = torch.cat([saved.out, saved.slack.unsqueeze(-1).to(saved.out.dtype)], -1)
    dq, dk, dv = run(pad(grad, (0, 1), value=1.0), saved._replace(v=pad(saved.v, (0, 1)), out=out, slack=None), layout)
    return dq, dk, dv[..., :-1]


def slack(grad: Tensor, saved: Saved, layout: Layout) -> Tensor:
    """`[R, H]`: `sum_j p (grad v^T - grad . out)`, over all keys that a row reads what `grad . out` lacks.

    It is the gradient of a channel where queries are 0 and keys are 1, by a backward pass of its own.
    """
    dq, _, _ = backward(grad, saved._replace(q=pad(saved.q, (0, 1)), k=pad(saved.k, (0, 1), value=1.0)), layout)
    return wide(dq[..., -1]) / layout.scale


def lacks(out: Tensor, q: Tensor) -> bool:
    """Whether such outputs, of queries `q`, are rounded so that their slack is worth a pass, and there is a channel left for it.

    Where one key carries a softmax `grad v^T - delta` is a small difference, which the rounding of the output would swamp.
    """
    return out.element_size() == 2 and max(q.shape[-1], out.shape[-1]) < _WIDEST


def kept_dtype(q: Tensor) -> torch.dtype:
    """The type of the output that the backward pass takes: flash attention wants that of q, the loop takes it wide."""
    return q.dtype if q.is_cuda else torch.promote_types(q.dtype, torch.float32)


def _slices(layout: Layout) -> Iterator[tuple[slice, slice]]:
    q, k = layout.cu_q.tolist(), layout.cu_k.tolist()
    for s in range(len(q) - 1):
        yield slice(q[s], q[s + 1]), slice(k[s], k[s + 1])


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[T, Hkv, D]` -> `[H, T, D]`, wide, key heads repeated."""
    return wide(x).transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _by_row(x: Tensor, heads: int) -> Tensor:
    """`[H, T, D]` -> `[T, heads, D]`, summed over the heads of a group."""
    summed: Tensor = x.unflatten(0, (heads, -1)).sum(1)
    return summed.transpose(0, 1)


def _logits(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """`[H, r, t]` of one segment."""
    logits = layout.scale * (_by_head(q, q.shape[1]) @ _by_head(k, q.shape[1]).mT)
    future = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")) if layout.causal else logits


def _loop_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    heads, out = q.shape[1], wide(v[:0]).new_empty(*q.shape[:2], v.shape[2])
    lse = wide(q).new_empty(heads, len(q))
    for i, j in _slices(layout):
        logits = _logits(q[i], k[j], layout)
        lse[:, i] = logits.logsumexp(-1)
        out[i] = ((logits - lse[:, i, None]).exp() @ _by_head(v[j], heads)).transpose(0, 1)
    return out, lse


def _loop_backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, _ = saved
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    heads, groups = q.shape[1], k.shape[1]
    delta = (wide(grad) * wide(out)).sum(-1).T.unsqueeze(-1)
    for i, j in _slices(layout):
        queries, keys, values, upstream = _by_head(q[i], heads), _by_head(k[j], heads), _by_head(v[j], heads), _by_head(grad[i], heads)
        p = (_logits(q[i], k[j], layout) - lse[:, i, None]).exp()
        ds = layout.scale * p * (upstream @ values.mT - delta[:, i])
        dq[i] = (ds @ keys).transpose(0, 1).to(q.dtype)
        dk[j], dv[j] = _by_row(ds.mT @ queries, groups).to(k.dtype), _by_row(p.mT @ upstream, groups).to(v.dtype)
    return dq, dk, dv


def _padded(width: int, *tensors: Tensor) -> list[Tensor]:
    """`[R, H, D]` -> `[R, H, width]`, zero columns added where there are fewer."""
    return [(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))).contiguous() for x in tensors]


def _flash_width(q: Tensor, v: Tensor) -> int:
    """Flash attention wants one head dimension for q, k and v, a multiple of 8; zero columns change nothing."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    q3, k3, v3 = _padded(_flash_width(q, v), q, k, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q3, k3, v3, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, 0.0, layout.causal, False, scale=layout.scale
    )
    return out[..., : v.shape[2]], lse.masked_fill(lse == float("inf"), float("-inf"))  # flash marks empty rows by +inf


def _flash_backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, _ = saved
    grad3, q3, k3, v3, out3 = _padded(_flash_width(q, v), grad, q, k, v, out)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random generator: there is no dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad3, q3, k3, v3, out3, lse.contiguous(), layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, 0.0, layout.causal,
        state, state.new_empty(()), scale=layout.scale,
    )  # fmt: skip
    return dq[..., : q.shape[2]], dk[..., : k.shape[2]], dv[..., : v.shape[2]]
