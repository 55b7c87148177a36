"""FlashAttention-2: the package flash-attn 2.x."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash_attn import flash_attn_func

from attnbench.stages import stage

from ._optional import installed

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.method import Params


def attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> Tensor:
    """`q: [B, N, H, D]` -> `[B, N, H, Dv]`."""
    with stage("attend"):
        out: Tensor | tuple[Tensor, ...] = flash_attn_func(q, k, v, causal=params.causal)
    return out[0] if isinstance(out, tuple) else out


def witness(q: Tensor, k: Tensor, v: Tensor, params: Params) -> str:  # noqa: ARG001
    """The package and its version."""
    return installed("flash-attn")
