"""Attention to compressed keys in Triton, forward and backward, and the choice of blocks of tokens by its probabilities, as in NSA.

Compressed key b stands for the tokens `b stride` to `b stride + length - 1`; a causal query reads it once its last token is not in the
future. Importance of a block of `block` tokens for a group of heads that share a key head: the sum of their probabilities, each
compressed key counted as often as its strides and the block's meet. Each query keeps the K blocks of largest importance; ties go to the
earlier block. The choice carries no gradient.

One kernel attends as flash attention does, with a staircase for a mask; one multiplies queries and compressed keys again, and adds
probabilities up to importances; one, a program a query, keeps the largest. Work of one head, N queries and C compressed keys: `2 N C (D +
Dv)` FLOP to attend and `2 N C D (1 + (length - stride) / block)` again, half of each where causal. Bytes that cross memory: q twice, the
output once, and `8 N E` for importances of E blocks, which exist for a slab of queries at a time, within SLAB_BYTES. Kept for the backward
pass: log-sum-exps and the output's rounding errors. Every sum has a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._define import misfits
from ._operator import compressed_forward
from ._plan import Selection

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Selection", "attend_compressed", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM, MOST_BLOCKS = 128, 16384


def supported(q: Tensor, k: Tensor, v: Tensor, s: Selection) -> list[str]:
    """Why these tensors cannot be run; empty means they can. Reads shapes and dtypes only."""
    checks = (
        *misfits(q, k, v, DTYPES, MOST_DIM),
        (bool(s.length % s.stride or s.block % s.stride) or s.length > s.block, "the stride must divide length and block, length <= block"),
        (k.shape[2] > s.blocks * (s.block // s.stride), f"{k.shape[2]} compressed keys are more than {s.keys} tokens have"),
        (s.blocks > MOST_BLOCKS, f"takes up to {MOST_BLOCKS} blocks, not {s.blocks}"),
    )
    return [reason for fails, reason in checks if fails]


def attend_compressed(q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of `q [B, H, N, D]` to compressed `k [B, Hkv, C, D]`, `v [B, Hkv, C, Dv]`, and the blocks that it chooses.

    Returns `[B, H, N, Dv]`, 0 where a query reads nothing, and `[B, Hkv, N, min(K, E)]` int32, ascending, then -1. `scale` defaults to
    `D ** -0.5`. Raises ValueError where the call is not supported.
    """
    if reasons := supported(q, k, v, selection):
        raise ValueError("; ".join(reasons))
    out, _, _, chosen = compressed_forward(q, k, v, [int(x) for x in selection], scale or q.shape[-1] ** -0.5)
    return out, chosen
