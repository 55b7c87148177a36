"""Attention inside segments: query rows and key rows lie segment after segment, and a query reads the keys of its own segment.

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
    """`[R, D]`"""
    k: Tensor
    """`[T, D]`"""
    v: Tensor
    """`[T, Dv]`"""
    out: Tensor
    """`[R, Dv]`, of the softmax over these keys and any others"""
    lse: Tensor
    """`[R]`, likewise; +inf where a row reads nothing"""


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Output `[R, Dv]` and log-sum-exp `[R]` (-inf where a segment has no keys) of `q: [R, D]`, `k: [T, D]`, `v: [T, Dv]`."""
    return _flash_forward(q, k, v, layout) if q.is_cuda else _loop_forward(q, k, v, layout)


def backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    With `p = exp(scale q.k - lse)` and `delta = grad . out`: `dv = p^T grad`, `ds = p (grad v^T - delta)`.
    """
    return _flash_backward(grad, saved, layout) if grad.is_cuda else _loop_backward(grad, saved, layout)


def _slices(layout: Layout) -> Iterator[tuple[slice, slice]]:
    q, k = layout.cu_q.tolist(), layout.cu_k.tolist()
    for s in range(len(q) - 1):
        yield slice(q[s], q[s + 1]), slice(k[s], k[s + 1])


def _logits(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    logits = layout.scale * (wide(q) @ wide(k).T)
    future = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")) if layout.causal else logits


def _loop_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    out = v.new_empty(q.shape[0], v.shape[1])
    lse = wide(q).new_empty(q.shape[0])
    for i, j in _slices(layout):
        logits = _logits(q[i], k[j], layout)
        lse[i] = logits.logsumexp(-1)
        out[i] = ((logits - lse[i, None]).exp() @ wide(v[j])).to(v.dtype)
    return out, lse


def _loop_backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = (wide(grad) * wide(out)).sum(-1, keepdim=True)
    for i, j in _slices(layout):
        p = (_logits(q[i], k[j], layout) - lse[i, None]).exp()
        ds = layout.scale * p * (wide(grad[i]) @ wide(v[j]).T - delta[i])
        dq[i], dk[j], dv[j] = (ds @ wide(k[j])).to(q.dtype), (ds.T @ wide(q[i])).to(k.dtype), (p.T @ wide(grad[i])).to(v.dtype)
    return dq, dk, dv


def _one_head(width: int, *tensors: Tensor) -> list[Tensor]:
    """`[R, D]` -> `[R, 1, width]`, zero columns added."""
    return [pad(x, (0, width - x.shape[-1])).unsqueeze(1).contiguous() for x in tensors]


def _flash_width(q: Tensor, v: Tensor) -> int:
    """Flash attention wants one head dimension for q, k and v, a multiple of 8; zero columns change nothing."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    q3, k3, v3 = _one_head(_flash_width(q, v), q, k, v)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q3, k3, v3, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, 0.0, layout.causal, False, scale=layout.scale
    )
    return out[:, 0, : v.shape[1]], lse[0].masked_fill(lse[0] == float("inf"), float("-inf"))  # flash marks empty rows by +inf


def _flash_backward(grad: Tensor, saved: Saved, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    grad3, q3, k3, v3, out3 = _one_head(_flash_width(q, v), grad, q, k, v, out)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random generator: there is no dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad3, q3, k3, v3, out3, lse[None].contiguous(), layout.cu_q, layout.cu_k, layout.max_q, layout.max_k, 0.0, layout.causal,
        state, state.new_empty(()), scale=layout.scale,
    )  # fmt: skip
    return dq[:, 0, : q.shape[1]], dk[:, 0, : k.shape[1]], dv[:, 0, : v.shape[1]]
