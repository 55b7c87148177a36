"""Sliding-window attention by the FlashAttention kernel in torch, whose operator takes a window and has a backward pass of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.stages import stage

if TYPE_CHECKING:
    from torch import Tensor

    from .sliding_window import SlidingWindowParams


def flash(q: Tensor, k: Tensor, v: Tensor, params: SlidingWindowParams) -> Tensor:
    """`q: [B, N, H, D]`, `k, v: [B, N, Hkv, D]` on CUDA in a half type -> `[B, N, H, D]`."""
    n = q.shape[1]
    before, after = (min(reach, n - 1) for reach in params.reach)
    forward = torch.ops.aten._flash_attention_forward.default
    with stage("attend"):
        out: Tensor = forward(q, k, v, None, None, n, n, 0.0, False, False, window_size_left=before, window_size_right=after)[0]
    return out
