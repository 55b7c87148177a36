"""Linear attention without N x N products: half-precision features, tensor-core products summed in float32, an analytic backward pass.

Keys and values fold into a state `[D, Dv + 1]`, the column Dv being z, both divided by M so that they fit float16. Passes over a
tensor of N x D elements, forward: 7 to make each of phi(k) and phi(q), 1 for z, 2 for S, about 4 to read the state and to divide,
so 21 where q, k, v and the output alone are 4; backward about 38, phi made anew and only inputs, states and denominators kept.
Heads are taken together as a budget of bytes allows; the queries of a group of heads are rows of their key head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.eager import wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._linear_causal import causal
from .linear import EPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .linear import LinearParams

_SUMMED = 1024
"""tokens summed by one product: a sum over all N in one product would leave most of a GPU idle"""
_COPIES = 8
"""tensors of the size of q that are alive at once in a step"""


def chunked(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Features are rounded to the dtype of q; sums are in at least float32."""
    b, h, n, d = q.shape
    if params.causal:
        return causal(q, k, v)
    rows = q.reshape(b * k.shape[1], -1, d)
    out: Tensor = _Bidirectional.apply(rows, k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]))  # type: ignore[no-untyped-call]
    return out.view(b, h, n, -1)


def _phi(x: Tensor) -> Tensor:
    """`elu(x) + 1` rounded once: `1 + x` above 0 and `exp(x)` below, which the derivative of elu multiplies by what it is given."""
    return _phi_backward((x + 1).clamp_(min=1), x)


def _phi_backward(grad: Tensor, x: Tensor) -> Tensor:
    """`grad phi'(x)`, in place of `grad`: the derivative of phi is 1 above 0 and `exp(x)` below."""
    product: Tensor = torch.ops.aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, False, x, grad_input=grad)
    return product


def _augmented(width: int) -> int:
    """Columns of a matrix of `width` columns and one more, a multiple of 8 as tensor cores want it."""
    return -(-(width + 1) // 8) * 8


def _outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a^T b` `[X, D, E]` in at least float32 of `a: [X, N, D]` and `b: [X, N, E]`, as a sum over runs of rows."""
    x, n, d = a.shape
    runs = next(r for r in range(max(1, n // _SUMMED), 0, -1) if n % r == 0)
    left, right = a.reshape(x * runs, n // runs, d).transpose(1, 2), b.reshape(x * runs, n // runs, -1)
    if a.is_cuda and a.element_size() == 2 and hasattr(torch.ops.aten.bmm, "dtype"):
        products = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        products = torch.bmm(left, right)
    return products.view(x, runs, d, -1).sum(1, dtype=wide(a[:0]).dtype)


def _state(key: Tensor, v: Tensor) -> Tensor:
    """S, z and zero columns, over M, in at least float32: `[X, D, augmented Dv]`."""
    x, keys, d = key.shape
    state = wide(key[:0]).new_zeros(x, d, _augmented(v.shape[2]))
    state[..., : v.shape[2]] = _outer_sum(key, v)
    state[..., v.shape[2]] = key.sum(1, dtype=state.dtype)
    return state / keys


def _centred(state: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The state of half-precision values less their mean `[X, Dv, 1]`: rounded gradients are then no small differences."""
    values, total = state[..., : v.shape[2]], state[..., v.shape[2] : v.shape[2] + 1]
    mean = values.sum(1, keepdim=True) / total.sum(1, keepdim=True)
    mean = mean if v.element_size() == 2 else torch.zeros_like(mean)
    return torch.cat([values - total * mean, state[..., v.shape[2] :]], -1), mean.transpose(1, 2)


def _steps(q: Tensor, k: Tensor, v: Tensor) -> Iterator[slice]:
    """Key heads to take together."""
    rows = max(q.shape[1], k.shape[1])
    step = rows_per_chunk(q, _COPIES * rows * (q.shape[2] + v.shape[2]) // 2 * q.element_size())
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q: [X, N, D]`, `k: [X, M, D]`, `v: [X, M, Dv]` -> `[X, N, Dv]`."""
        width, out = v.shape[2], q.new_empty(*q.shape[:2], v.shape[2])
        states, totals = [], []
        for heads in _steps(q, k, v):
            with stage("state"):
                states.append(_state(_phi(k[heads]), v[heads]))
            with stage("attend"):
                mixed = torch.bmm(_phi(q[heads]), states[-1].to(q.dtype))
                totals.append(mixed[..., width : width + 1] + EPS / k.shape[1])
                torch.div(mixed[..., :width], totals[-1], out=out[heads])
        ctx.save_for_backward(q, k, v, torch.cat(states), torch.cat(totals))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With `a = g / (phi(q).z + eps)` and `r = -a.o`: `dphi(q) = a S^T + r z^T`, `dS = phi(q)^T a`, `dz = phi(q)^T r`,
        `dphi(k) = v dS^T + dz`, `dv = phi(k) dS`; taking the mean off v takes it off o and changes dz alone."""
        q, k, v, state, total = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        width, share = v.shape[2], 1 / k.shape[1]
        state, mean = _centred(state, v)
        rounded = state.to(q.dtype)
        for heads in _steps(q, k, v):
            query, a = _phi(q[heads]), grad.new_empty(*grad[heads].shape[:2], state.shape[2])
            torch.div(grad[heads], total[heads], out=a[..., :width])
            product = torch.bmm(query, rounded[heads, :, :width]).mul_(a[..., :width])
            a[..., width:] = 0
            a[..., width] = -product.sum(2, dtype=state.dtype) / total[heads, :, 0]
            torch.bmm(a, rounded[heads].transpose(1, 2), out=dq[heads])
            _phi_backward(dq[heads], q[heads])
            dstate = _outer_sum(query, a)
            dz = dstate[..., width] - (dstate[..., :width] @ mean[heads])[..., 0]
            ds = dstate[..., :width].to(v.dtype)
            torch.baddbmm(dz.unsqueeze(1).to(v.dtype), v[heads], ds.transpose(1, 2), beta=share, alpha=share, out=dk[heads])
            _phi_backward(dk[heads], k[heads])
            torch.baddbmm(dv[heads], _phi(k[heads]), ds, beta=0, alpha=share, out=dv[heads])
        return dq, dk, dv
