"""xformers' memory-efficient attention, imported so that its known obstacles are out of the way."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from attnbench.stages import stage

from ._optional import flash_attn_hidden, installed, preload_cuda_runtime

preload_cuda_runtime()
with flash_attn_hidden():
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    from xformers.ops.fmha import Inputs, dispatch

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Params


def attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """`q: [B, N, H, D]`, `k, v: [B, M, Hkv, D]` -> `[B, N, H, Dv]`."""
    with stage("attend"):
        out: Tensor = memory_efficient_attention(*_grouped(q, k, v), attn_bias=LowerTriangularMask() if params.causal else None)
    return out.flatten(2, 3) if out.ndim == 5 else out


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as xformers wants shared key heads: `[B, N, Hkv, H / Hkv, D]`, keys repeated without a copy.

    Its backward passes take no such layout: where gradients are wanted keys and values are copied for every query head.
    """
    heads = k.shape[2]
    if heads == q.shape[2]:
        return q, k, v
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        copies = q.shape[2] // heads
        return q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    query = q.reshape(*q.shape[:2], heads, -1, q.shape[3])
    key, value = (x.unsqueeze(3).expand(-1, -1, -1, query.shape[3], -1) for x in (k, v))
    return query, key, value


def witness(q: Tensor, k: Tensor, v: Tensor, params: Params) -> str:
    """Version, and the operators that xformers' dispatcher picks for `[B, H, N, D]` inputs: forward, then backward if there is one."""
    moved = _grouped(*(x.transpose(1, 2) for x in (q, k, v)))
    inputs = Inputs(*moved, attn_bias=LowerTriangularMask() if params.causal else None)
    inputs.normalize_bmhk()
    names = [dispatch._dispatch_fw(inputs, needs_gradient=any(x.requires_grad for x in (q, k, v))).NAME]
    with suppress(NotImplementedError):
        names.append(dispatch._dispatch_bw(inputs, varlen_lse_packed=None).NAME)
    return f"{installed('xformers')}: {', '.join(names)}"
