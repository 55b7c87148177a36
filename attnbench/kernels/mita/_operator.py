"""The operator as torch sees it: two operators, shapes for tracing, and the gradient that links them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define, on_device
from ._backward import backward
from ._forward import Saved, Setting, forward
from ._plan import most_segments


def _setting(topk: int, experts: int, shared: bool, routed: bool, scale: float, shared_scale: float, grid: list[int]) -> Setting:
    return Setting(topk, experts, shared, routed, scale, shared_scale, tuple(grid))


@define("mita_forward")
def mita_forward(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor | None, topk: int, experts: int, shared: bool, routed: bool,
    scale: float, shared_scale: float, grid: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, then the fields of `Saved`."""
    with on_device(q):
        out, saved = forward(q, k, v, landmarks, _setting(topk, experts, shared, routed, scale, shared_scale, grid))
    # an operator may not return its input
    saved = saved if landmarks is None else saved._replace(r=saved.r.clone())
    return out, *saved  # type: ignore[return-value]


@torch.library.register_fake(mita_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor | None, topk: int, experts: int, shared: bool, routed: bool,
    scale: float, shared_scale: float, grid: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    b, h, n, d = q.shape
    m = grid[3] * grid[4] if landmarks is None else landmarks.shape[2]
    m_s, m_r = m if shared else 0, m if routed else 0
    s = min(experts, m)
    float_, int_ = {"dtype": torch.float32}, {"dtype": torch.int32}
    return (
        q.new_empty(b, h, n, v.shape[3]), q.new_empty(b, h, n, **float_), q.new_empty(b, h, m, d), v.new_empty(b, h, m_s, v.shape[3]),
        q.new_empty(b, h, m_s, 2, **float_), q.new_empty(b, h, m_r, min(topk, k.shape[2]), **int_),
        q.new_empty(b, h, s * n if routed else 0, **int_), q.new_empty(b, h, m + 1 if routed else 0, **int_),
        q.new_empty(b, h, most_segments(s * n, m) if routed else 0, 4, **int_),
    )  # fmt: skip


@define("mita_backward", final=True)
def mita_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: list[Tensor], topk: int, experts: int, shared: bool, routed: bool,
    scale: float, shared_scale: float, grid: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, in float32, of the landmarks."""
    with on_device(q):
        dq, dk, dv, dr = backward(
            grad, q, k, v, out, Saved(*saved), _setting(topk, experts, shared, routed, scale, shared_scale, grid)
        )  # fmt: skip
    return dq, dk, dv, dr


@torch.library.register_fake(mita_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: list[Tensor], topk: int, experts: int, shared: bool, routed: bool,
    scale: float, shared_scale: float, grid: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), saved[1].new_empty(saved[1].shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, landmarks, *ctx.setting = inputs
    ctx.landmarks = None if landmarks is None else landmarks.dtype
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.setting)
    if grad is None:
        return None, None, None, None, *none
    q, k, v, out, *saved = ctx.saved_tensors
    dq, dk, dv, dr = mita_backward(grad, q, k, v, out, saved, *ctx.setting)
    return dq, dk, dv, dr.to(ctx.landmarks) if ctx.landmarks else None, *none


torch.library.register_autograd(mita_forward, _grad, setup_context=_save)
