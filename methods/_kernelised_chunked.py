"""Bidirectional kernelised attention: half-precision features, tensor-core products summed in float32, an analytic backward pass.

Keys and values fold into a state `[R, Dv + 1]`, the last column being z, both divided by M so that they fit float16. Features are made
part by part, as a budget of bytes allows, and made anew in the backward pass: kept are the inputs, the states and the denominators.
The queries of a group of heads are rows of their key head.

Where few features of a query are above 0 its gradient is a small difference, of what its values and what its denominator contribute.
So z, and the gradient r of a denominator, are two half-precision numbers each, a rounded one and what it lacks: they stand in columns
that products have anyway, up to a multiple of 8 for tensor cores.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attnbench.eager import wide
from attnbench.stages import stage

from ._products import outer_sum, wide_bmm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._kernel import Kernel, Part
    from ._kernelised import Normaliser

_COLUMNS = 3
"""of a state for each denominator: see `_rounded`"""


def bidirectional(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Features are rounded to the dtype of q; sums are in at least float32."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    out: Tensor = _Bidirectional.apply(grouped, k.unsqueeze(2), v.unsqueeze(2), kernel, *kernel.weights)  # type: ignore[no-untyped-call]
    return out.flatten(1, 2)


def _made(kernel: Kernel, x: Tensor, part: Part) -> Tensor:
    """Features, in the forward pass."""
    with stage("project") if kernel.projects else nullcontext():
        return kernel.features(part.of(x), part)


def _rows(x: Tensor) -> Tensor:
    """`[b, h, g, n, X]` -> `[b h, g n, X]`."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[4])


def _state(k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
    """S, z and columns of zeros, as `_rounded` wants them, over M, in at least float32: `[B, Hkv, R, C]`."""
    width, state = v.shape[4], None
    padding = -(width + _COLUMNS * kernel.reads) % 8 + _COLUMNS * kernel.reads - 1
    for part in kernel.parts("key", k, width):
        key = _made(kernel, k, part)
        outer = outer_sum(_rows(key), _rows(part.of(v))).view(*key.shape[:2], kernel.width, -1)
        total = key.sum((2, 3), dtype=outer.dtype).unsqueeze(3)
        sums = torch.cat([outer, total, total.new_zeros(1).expand(*total.shape[:3], padding)], 3)
        state = _added(state, sums, part, k)
    assert state is not None
    return state / k.shape[3]


def _added(total: Tensor | None, piece: Tensor, part: Part, x: Tensor) -> Tensor:
    """Sums over tokens `[B, Hkv, R, C]` of `x` with a part of them added; the first piece itself where it is of all heads."""
    if total is None and piece.shape[:2] == x.shape[:2]:
        return piece
    total = piece.new_zeros(*x.shape[:2], *piece.shape[2:]) if total is None else total
    total[part.batch, part.heads].add_(piece)
    return total


def _denominate(total: Tensor, keys: int, kernel: Kernel, out: Tensor) -> None:
    """What mixed values are divided by: infinite where a query or all keys have no features, so that it reads and changes nothing."""
    norm = kernel.norm
    torch.add(total, norm.add if norm.mean else norm.add / keys, out=out)
    if norm.least:
        out.clamp_(min=_least(norm, keys, out.dtype))
    if kernel.vanishes:
        out.masked_fill_(total == 0, torch.inf)


@lru_cache(maxsize=64)
def _least(norm: Normaliser, keys: int, dtype: torch.dtype) -> float:
    """The bound of denominators over M, rounded to `dtype`."""
    return torch.tensor(norm.least / keys, dtype=dtype).item()


def _centred(matrix: Tensor, width: int, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """What queries multiply, less the mean value `[B, Hkv, Dv, 1]`: rounded gradients are then no small differences."""
    centred, means = matrix.clone(), []
    for i, c in enumerate(kernel.columns(width)):
        total = matrix[..., width + i : width + i + 1]
        sums = total.sum(2, keepdim=True)
        sums = sums.clamp(min=torch.finfo(sums.dtype).tiny) if kernel.vanishes else sums
        means.append(matrix[..., c].sum(2, keepdim=True) / sums)
        centred[..., c].sub_(total * means[-1])
    return centred, torch.cat(means, 3).transpose(2, 3)


def _rounded(matrix: Tensor, width: int, kernel: Kernel, dtype: torch.dtype) -> Tensor:
    """`matrix` in `dtype`: values, z, what z lacks, and z again, which the second part of r multiplies."""
    out, reads = matrix.to(dtype), kernel.reads
    z, second, again = (slice(width + i * reads, width + (i + 1) * reads) for i in range(_COLUMNS))
    torch.sub(matrix[..., z], out[..., z], out=out[..., second])
    out[..., again] = out[..., z]
    return out


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, *weights: Tensor) -> Tensor:
        """`q: [B, Hkv, G, N, D]`, `k: [B, Hkv, 1, M, D]`, `v: [B, Hkv, 1, M, Dv]` -> `[B, Hkv, G, N, Dv]`."""
        width, out = v.shape[4], q.new_empty(*q.shape[:4], v.shape[4])
        reads = kernel.reads
        totals = q.new_empty(*q.shape[:4], reads, dtype=torch.promote_types(q.dtype, torch.float32))
        with stage("state"):
            matrix = kernel.spread(_state(k, v, kernel))
            rounded = _rounded(matrix, width, kernel, q.dtype)
        with stage("attend"):
            for part in kernel.parts("query", q, width):
                query = _made(kernel, q, part)
                mixed = wide_bmm(_rows(query), part.states(rounded)).view(*query.shape[:4], -1)
                total = mixed[..., width : width + reads] + mixed[..., width + reads : width + 2 * reads]
                _denominate(total, k.shape[3], kernel, part.of(totals))
                for i, c in enumerate(kernel.columns(width)):
                    torch.div(mixed[..., c], part.of(totals)[..., i : i + 1], out=part.of(out)[..., c])
        ctx.save_for_backward(q, k, v, matrix, totals, *weights)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With `a = g / n` and `r = -a.o`: `dphi(q) = a S^T + r z^T`, `dS = phi(q)^T a`, `dz = phi(q)^T r`, `dphi(k) = v dS^T + dz`,
        `dv = phi(k) dS`; taking the mean off v adds `a.mean` to r and takes `dS mean` off dz."""
        q, k, v, matrix, totals, *weights = ctx.saved_tensors
        width, kernel = v.shape[4], ctx.kernel
        sums = [torch.zeros_like(wide(w)) for w in weights]
        dq, dmatrix, mean = _read_backward(grad, q, totals, matrix, kernel=kernel, keys=k.shape[3], sums=sums)
        dstate = kernel.gather(dmatrix)
        dstate[..., width : width + 1].sub_(dstate[..., :width] @ mean)
        dk, dv = _state_backward(dstate, k, v, kernel=kernel, sums=sums)
        return dq, dk, dv, None, *(x.to(w.dtype) for x, w in zip(sums, weights, strict=True))


def _read_backward(
    grad: Tensor, q: Tensor, totals: Tensor, matrix: Tensor, *, kernel: Kernel, keys: int, sums: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries and, in at least float32, of what they multiply, less the mean value, and that mean.

    Gradients of weights are added to `sums`.
    """
    width, reads, dq, dmatrix = grad.shape[4], kernel.reads, q.new_empty(q.shape), None
    matrix, mean = _centred(matrix, width, kernel)
    rounded = _rounded(matrix, width, kernel, q.dtype)
    for part in kernel.parts("query", q, width):
        own, query = part.states(rounded), kernel.features(part.of(q), part)
        a = grad.new_empty(*query.shape[:4], matrix.shape[3])
        a[..., width:] = 0
        product = wide_bmm(_rows(query), own[..., :width]).view(*query.shape[:4], width)
        for i, c in enumerate(kernel.columns(width)):
            total = part.of(totals)[..., i : i + 1]
            torch.div(part.of(grad)[..., c], total, out=a[..., c])
            r = product[..., c].mul_(a[..., c]).sum(-1, keepdim=True).neg_().div_(total)
            if kernel.norm.add or kernel.norm.least:
                held = wide_bmm(_rows(a[..., c]), part.states(mean)[:, c].to(a.dtype)).view(r.shape)
                r = _completed(r, held, total, kernel.norm, keys)
            z, second, again = (slice(width + j * reads + i, width + j * reads + i + 1) for j in range(_COLUMNS))
            a[..., z] = a[..., second] = r
            a[..., again] = r - a[..., z]
        dmatrix = _added(dmatrix, outer_sum(_rows(query), _rows(a)).view(*query.shape[:2], kernel.width, -1), part, q)
        dfeatures = wide_bmm(_rows(a), own.transpose(1, 2)).view_as(query)
        _add(sums, kernel.backward(dfeatures, query, part.of(q), part, part.of(dq)))
    assert dmatrix is not None
    dmatrix[..., width : width + reads] += dmatrix[..., width + 2 * reads : width + 3 * reads]
    return dq, dmatrix, mean


def _completed(r: Tensor, held: Tensor, total: Tensor, norm: Normaliser, keys: int) -> Tensor:
    """r where a denominator is more than the sum that the mean was taken off, from `-a.(o - mean)` and `held`, which is `a.mean`.

    At its bound a denominator has no slope: then r is what the mean adds.
    """
    out = torch.addcdiv(r, held, total, value=norm.add if norm.mean else norm.add / keys)
    return torch.where(total <= _least(norm, keys, total.dtype), held, out) if norm.least else out


def _state_backward(dstate: Tensor, k: Tensor, v: Tensor, *, kernel: Kernel, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values; those of weights are added to `sums`."""
    dk, dv, width = k.new_empty(k.shape), v.new_empty(v.shape), v.shape[4]
    rounded = _rounded(dstate, width, kernel, v.dtype)
    if kernel.dominated:
        rounded = torch.cat([rounded, (dstate - rounded)[..., :width].to(v.dtype)], 3)
    for part in kernel.parts("key", k, width):
        key, values, dvalues = kernel.features(part.of(k), part), _rows(part.of(v)), part.of(dv)
        own = part.states(rounded)
        target = dvalues.view(-1, *dvalues.shape[3:])
        torch.baddbmm(target, _rows(key), own[..., :width], beta=0, alpha=part.share, out=target)
        dfeatures = wide_bmm(_augmented(values, kernel, own.shape[2]), own.transpose(1, 2))
        _add(sums, kernel.backward(dfeatures.view_as(key), key, part.of(k), part, part.of(dk)))
    return dk, dv


def _augmented(values: Tensor, kernel: Kernel, columns: int) -> Tensor:
    """What the gradient of the state multiplies, in `columns`: `values: [X, M, Dv]`, ones for dz and for what its rounding lacks, zeros,
    and values again for what that of dS lacks.
    """
    width = values.shape[2]
    out = pad(values, (0, columns - width))
    out[..., width : width + kernel.reads + 1 : kernel.reads] = 1
    if kernel.dominated:
        out[..., -width:] = values
    return out


def _add(sums: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for total, grad in zip(sums, grads, strict=True):
        total.add_(grad)
