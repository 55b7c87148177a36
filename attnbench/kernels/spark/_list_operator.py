"""Launches of the kernels of lists, and of those of pairs where lists will not do; their operators as torch sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define, on_device, unit_rows
from ._forward import spark_attend_kernel
from ._gradient import spark_key_gradient_kernel, spark_query_gradient_kernel
from ._lists import spark_gather_kernel, spark_list_kernel, spark_spread_kernel
from ._plan import TILE, list_constants, pair_constants, width


@define("spark_listed_forward")
def listed_forward(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the base-2 log-sum-exp and the threshold used `[B, H, N]`, lists `[B, H, N, L]`, their lengths, tiles without."""
    q, k, v, limit = unit_rows(q), unit_rows(k), unit_rows(v), limit.float().contiguous()
    (b, h, n, _), m, fp32 = q.shape, k.shape[2], q.dtype == torch.float32
    out, tiles = q.new_empty(b, h, n, v.shape[3]), -(-n // TILE)
    lse, used = (torch.empty(b, h, n, dtype=torch.float32, device=q.device) for _ in range(2))
    index, count, flags = (torch.empty(b, h, *size, dtype=torch.int32, device=q.device) for size in ((n, longest), (n,), (tiles,)))
    strides, gathers = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), list_constants(q, k, v, predictor, longest)
    with on_device(q):
        spark_list_kernel[(b * h * tiles,)](
            q, k, limit, index, count, flags, *q.stride()[:3], *k.stride()[:3], h, n, m, tiles, G=gathers["G"], R=predictor,
            BR=width(predictor), L=longest, BQ=TILE, BN=64, CAUSAL=causal, PREC="tf32x3" if fp32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        spark_gather_kernel[(b * h * n,)](q, k, v, index, count, flags, out, lse, *strides, h, n, tiles, scale, scale_s, **gathers)
        spark_attend_kernel[(b * h * tiles,)](
            q, k, v, limit, flags, out, lse, used, *strides, h, n, m, tiles, scale, scale_s, SOME=True,
            **pair_constants(q, k, v, predictor, causal=causal, backward=False),
        )  # fmt: skip
    return out, lse, used, index, count, flags


@torch.library.register_fake(listed_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    lse = q.new_empty(b, h, n, dtype=torch.float32)
    index, count, flags = (q.new_empty(b, h, *size, dtype=torch.int32) for size in ((n, longest), (n,), (-(-n // TILE),)))
    return q.new_empty(b, h, n, v.shape[3]), lse, torch.empty_like(lse), index, count, flags


@define("spark_listed_backward", final=True)
def listed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v, grad, (out, lse, used, index, count, flags) = unit_rows(q), unit_rows(k), unit_rows(v), grad.contiguous(), saved
    (b, h, n, _), m, tiles = q.shape, k.shape[2], flags.shape[2]
    dq, delta = q.new_empty(q.shape), (grad.float() * out.float()).sum(-1)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    constants, some = pair_constants(q, k, v, predictor, causal=causal, backward=True), flags.amax()
    shared = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], h, n, m)
    with on_device(q):
        spark_spread_kernel[(b * h * n,)](
            q, k, v, index, count, flags, grad, lse, delta, dq, dk, dv, *shared, tiles, scale, scale_s,
            **list_constants(q, k, v, predictor, index.shape[3]),
        )  # fmt: skip
        tiles = -(-n // constants["BQ"])
        spark_query_gradient_kernel[(b * h * tiles,)](
            q, k, v, grad, lse, used, delta, flags, dq, *shared, tiles, scale, scale_s, SOME=True, **constants
        )  # fmt: skip
        tiles = -(-m // constants["BN"])
        spark_key_gradient_kernel[(b * k.shape[1] * tiles,)](
            q, k, v, grad, lse, used, delta, flags, some, dk, dv, *shared, tiles, scale, scale_s, SOME=True, **constants
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@torch.library.register_fake(listed_backward)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], predictor: int, scale: float, scale_s: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, *setting, _, causal = inputs
    ctx.setting = (*setting, causal)
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * (2 + len(ctx.setting))
    if grad is None:
        return None, None, None, *none
    q, k, v, *saved = ctx.saved_tensors
    return *listed_backward(grad, q, k, v, saved, *ctx.setting), *none


torch.library.register_autograd(listed_forward, _grad, setup_context=_save)
