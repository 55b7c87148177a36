"""Launches of the kernels of pairs, and their operators as torch sees them: shapes for tracing, and the gradient that links them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define, on_device, unit_rows
from ._forward import spark_attend_kernel, spark_statistics_kernel
from ._gradient import spark_key_gradient_kernel, spark_query_gradient_kernel
from ._plan import pair_constants, width


@define("spark_statistics", final=True)
def spark_statistics(q: Tensor, k: Tensor, predictor: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations, `[B, H, N]` in float32, of the predicted scores that causal queries see."""
    q, k = unit_rows(q), unit_rows(k)
    b, h, n, _ = q.shape
    mean, squares = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    fp32, tiles = q.dtype == torch.float32, -(-n // 64)
    with on_device(q):
        spark_statistics_kernel[(b * h * tiles,)](
            q, k, mean, squares, *q.stride()[:3], *k.stride()[:3], h, n, k.shape[2], tiles, G=h // k.shape[1], R=predictor,
            BR=width(predictor), BQ=64, BN=64, PREC="tf32x3" if fp32 else "tf32", num_warps=4,
        )  # fmt: skip
    return mean, squares


@torch.library.register_fake(spark_statistics)
def _(q: Tensor, k: Tensor, predictor: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


@define("spark_forward")
def spark_forward(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the base-2 log-sum-exp and the threshold used, `[B, H, N]` each."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    b, h, n, _ = q.shape
    out = q.new_empty(b, h, n, v.shape[3])
    lse, used = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    constants = pair_constants(q, k, v, predictor, causal=causal, backward=False)
    tiles = -(-n // constants["BQ"])
    with on_device(q):
        spark_attend_kernel[(b * h * tiles,)](
            q, k, v, limit.float().contiguous(), q, out, lse, used, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, k.shape[2],
            tiles, scale, scale_s, SOME=False, **constants,
        )  # fmt: skip
    return out, lse, used


@torch.library.register_fake(spark_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, torch.empty_like(lse)


@define("spark_backward", final=True)
def spark_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, used: Tensor, predictor: int, scale: float, scale_s: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    q, k, v, grad = unit_rows(q), unit_rows(k), unit_rows(v), grad.contiguous()
    (b, h, n, _), m = q.shape, k.shape[2]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = (grad.float() * out.float()).sum(-1)
    constants = pair_constants(q, k, v, predictor, causal=causal, backward=True)
    shared = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, m)
    with on_device(q):
        tiles = -(-n // constants["BQ"])
        spark_query_gradient_kernel[(b * h * tiles,)](
            q, k, v, grad, lse, used, delta, q, dq, *shared, tiles, scale, scale_s, SOME=False, **constants
        )  # fmt: skip
        tiles = -(-m // constants["BN"])
        spark_key_gradient_kernel[(b * k.shape[1] * tiles,)](
            q, k, v, grad, lse, used, delta, q, q, dk, dv, *shared, tiles, scale, scale_s, SOME=False, **constants
        )  # fmt: skip
    return dq, dk, dv


@torch.library.register_fake(spark_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, used: Tensor, predictor: int, scale: float, scale_s: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, *ctx.setting = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (1 + len(ctx.setting))
    if grad is None:
        return None, None, None, *none
    return *spark_backward(grad, *ctx.saved_tensors, *ctx.setting), *none


torch.library.register_autograd(spark_forward, _grad, setup_context=_save)
