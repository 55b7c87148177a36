"""Spark attention in chunks of queries, masked: one chunk of scores exists at a time, and thresholds are kept for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from attnbench.eager import masked_softmax, wide
from attnbench.stages import stage

from ._chunks import row_chunks, wide_scores, zeros_wide
from ._constants import constant
from ._products import outer_sum
from .spark import Counts, above, counted, lowered, scaled, threshold

if TYPE_CHECKING:
    from .spark import SparkParams

_ARRAYS = 10  # of scores of a chunk that exist at once
_SPARE = 4  # room in a list, times K


def chunked(q: Tensor, k: Tensor, v: Tensor, params: SparkParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory O(N) and one chunk of scores."""
    out: Tensor = _Spark.apply(q, k, v, params)  # type: ignore[no-untyped-call]
    return out


def fused(q: Tensor, k: Tensor, v: Tensor, params: SparkParams) -> Tensor:
    """The same in one pass over pairs by `attnbench.kernels.spark`, with one pass before it for the thresholds of causal queries."""
    from attnbench.kernels.spark import spark_attention

    r = params.split(q.shape[-1])
    return spark_attention(q, k, v, _known(q, k, params), r, *params.factors(q.shape[-1]), causal=params.causal)


def listed(q: Tensor, k: Tensor, v: Tensor, params: SparkParams) -> Tensor:
    """The same by `attnbench.kernels.spark`, in lists of up to four times as many keys as are kept where scores are normal."""
    from attnbench.kernels.spark import spark_listed

    r, longest = params.split(q.shape[-1]), min(_SPARE * params.topk, k.shape[2])
    return spark_listed(q, k, v, _known(q, k, params), r, *params.factors(q.shape[-1]), longest, causal=params.causal)


@torch.no_grad()
def _known(q: Tensor, k: Tensor, params: SparkParams) -> Tensor:
    """Thresholds `[B, H, N]` before any is lowered."""
    from attnbench.kernels.spark import spark_statistics

    r = params.split(q.shape[-1])
    with stage("select"):
        if not params.causal:
            return limits(q[..., :r], k[..., :r], params).squeeze(-1)
        mean, squares = spark_statistics(q, k, r)
        found: Tensor = mean + _deviations(squares, (q.shape[2], k.shape[2]), params)
        return found


@torch.no_grad()
def limits(q: Tensor, k: Tensor, params: SparkParams) -> Tensor:
    """Thresholds `[B, H, N, 1]` of bidirectional queries without their scores, from the mean and the covariance of the keys.

    `mean_j q.k_j = q.mean(k)` and `sum_j (q.k_j - q.mean(k))^2 = q S q`, S the sum of outer products of centred keys: summed by runs,
    since a threshold off by 1e-5 keeps another key than the definition in 1 of 100 queries of 262144 keys.
    """
    keys = wide(k)
    mean = keys.mean(2, keepdim=True)
    centred = (keys - mean).flatten(0, 1)
    scatter = outer_sum(centred, centred).unflatten(0, k.shape[:2])
    query = _grouped(wide(q), k.shape[1])
    squares = ((query @ scatter) * query).sum(-1, keepdim=True).clamp(min=0)
    limit = query @ mean.transpose(-1, -2) + _deviations(squares, (0, k.shape[2]), params)
    return limit.view(*q.shape[:3], 1)


def _deviations(squares: Tensor, sizes: tuple[int, int], params: SparkParams) -> Tensor:
    """`spark.deviations` of as many causal queries and keys; of bidirectional ones where the former are 0."""

    def make() -> Counts:
        causal = torch.arange(1, sizes[0] + 1, device=squares.device).clamp(max=sizes[1])
        count = causal if sizes[0] else torch.full((), sizes[1], device=squares.device)
        return counted(count, params, squares.dtype)

    return scaled(squares, constant(make, squares.device, "spark", sizes, params, squares.dtype))


class _Parts(NamedTuple):
    """A chunk of queries: what they read."""

    weights: Tensor
    """`[B, H, R, M]` softmax over the keys kept"""
    logits: Tensor
    """`[B, H, R, M]` of the gate"""
    limit: Tensor
    """`[B, H, R, 1]`"""


class _Spark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, params: SparkParams) -> Tensor:
        r, out = params.split(q.shape[-1]), q.new_empty(*q.shape[:3], v.shape[3])
        q_r, q_s, k_r, k_s, v = (x.contiguous() for x in (q[..., :r], q[..., r:], k[..., :r], k[..., r:], v))
        with stage("select"):
            limit = wide(q_r.new_empty(*q_r.shape[:3], 1)) if params.causal else limits(q_r, k_r, params)
        for rows in _chunks(q_r, k_r):
            known = None if params.causal else limit[:, :, rows]
            seen = _seen(rows, k_r, params)
            part = _read((q_r[:, :, rows], q_s[:, :, rows], k_r[:, :, seen], k_s[:, :, seen]), rows, known, params)
            limit[:, :, rows] = part.limit
            with stage("attend"):
                out[:, :, rows] = _mixed(part.weights * softplus(part.logits), v[:, :, seen])
        ctx.params = params
        ctx.save_for_backward(q_r, q_s, k_r, k_s, v, limit)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_r, q_s, k_r, k_s, v, limit = ctx.saved_tensors
        dq_r, dq_s, dk_r, dk_s, dv = torch.empty_like(q_r), torch.empty_like(q_s), *(zeros_wide(x) for x in (k_r, k_s, v))
        scale, scale_s = ctx.params.factors(q_r.shape[-1] + q_s.shape[-1])
        for rows in _chunks(q_r, k_r):
            seen = _seen(rows, k_r, ctx.params)
            own = (q_r[:, :, rows], q_s[:, :, rows], k_r[:, :, seen], k_s[:, :, seen])
            p, logits, _ = _read(own, rows, limit[:, :, rows], ctx.params, final=True)
            gate, g = softplus(logits), grad[:, :, rows]
            dw = wide_scores(g.contiguous(), v[:, :, seen])
            dv[:, :, seen] += _folded(p * gate, g, v)
            ds = scale_s * dw * p * torch.sigmoid(logits)
            dq_s[:, :, rows] = _mixed(ds, own[3])
            dk_s[:, :, seen] += _folded(ds, own[1], k_s)
            dw = dw * gate
            ds = scale * p * (dw - (p * dw).sum(-1, keepdim=True))
            dq_r[:, :, rows] = _mixed(ds, own[2])
            dk_r[:, :, seen] += _folded(ds, own[0], k_r)
        dq, dk = torch.cat([dq_r, dq_s], -1), torch.cat([dk_r, dk_s], -1)
        return dq, dk.to(k_r.dtype), dv.to(v.dtype), None


def _chunks(q: Tensor, k: Tensor) -> Any:
    """The same runs of queries forwards and backwards, so that the same sums give the same choice."""
    return row_chunks(q, _ARRAYS * q.shape[0] * q.shape[1] * k.shape[2] * wide(q[..., :0]).element_size())


def _seen(rows: slice, k: Tensor, params: SparkParams) -> slice:
    """Keys that any query of the chunk sees."""
    return slice(0, min(rows.stop, k.shape[2]) if params.causal else k.shape[2])


def _read(
    parts: tuple[Tensor, Tensor, Tensor, Tensor], rows: slice, limit: Tensor | None, params: SparkParams, *, final: bool = False
) -> _Parts:
    """Weights and gate of the queries at `rows`, whose threshold is found where it is not known, and lowered where it is not final."""
    q_r, q_s, k_r, k_s = parts
    scale, scale_s = params.factors(q_r.shape[-1] + q_s.shape[-1])
    place = torch.arange(rows.start, rows.stop, device=q_r.device)
    with stage("score"):
        scores = wide_scores(q_r, k_r)
    with stage("select"):
        if limit is None:
            limit = threshold(scores, place, params)
        elif not final:
            limit = lowered(limit, scores)
        mask = above(scores, limit, place, params)
    with stage("attend"):
        return _Parts(masked_softmax(scale * scores, mask), scale_s * wide_scores(q_s, k_s), limit)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Query heads that read one key head, side by side: `[B, H, R, W]` -> `[B, heads, G R, W]`."""
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    """`weights: [B, H, R, M]` times `x: [B, Hkv, M, W]` -> `[B, H, R, W]`."""
    return (_grouped(weights, x.shape[1]).to(x.dtype) @ x).view(*weights.shape[:3], x.shape[3])


def _folded(weights: Tensor, x: Tensor, k: Tensor) -> Tensor:
    """`weights: [B, H, R, M]` transposed, times `x: [B, H, R, W]`, summed over the heads of a group -> `[B, Hkv, M, W]`."""
    return wide(_grouped(weights, k.shape[1]).to(x.dtype).transpose(-1, -2) @ _grouped(x, k.shape[1]))
