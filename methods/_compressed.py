"""Queries that read a few compressed keys, the last step of every method that folds all keys into some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbench.eager import attend, expand_heads
from attnbench.sdpa import attention
from attnbench.stages import stage

from ._products import divisor

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = {"cuda": 512, "cpu": 1}
"""blocks of keys that the backward pass should have to work on at once: a few for each multiprocessor"""
_KEYS = 128
"""keys in a block of the backward kernels"""
_LEAST = 1024
"""queries in a run, at least"""


def attend_few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` `[B, H, N, Dv]` of `q: [B, H, N, D]` and few keys `k: [B, Hkv, K, D]`, `v: [B, Hkv, K, Dv]`.

    Backward kernels of attention run over blocks of keys in parallel, so that few keys would leave most of a GPU idle: queries are cut
    into runs, which become heads of their own. Keys and values are copied to each; autograd sums their gradients. A key alone is read
    whatever its score, which has no gradient: fused kernels would leave their rounding as one.
    """
    if k.shape[2] == 1:
        return attend(q, *expand_heads(q, k, v), q.shape[3] ** -0.5)
    runs = divisor(q.shape[2], min(_BLOCKS[q.device.type] // (q.shape[0] * q.shape[1] * -(-k.shape[2] // _KEYS)), q.shape[2] // _LEAST))
    with stage("attend"):
        copies = q.shape[1] // k.shape[1] * runs
        keys, values = (x if copies == 1 else x.repeat_interleave(copies, 1) for x in (k, v))
        out = attention(q.unflatten(2, (runs, -1)).flatten(1, 2), keys, values)
        return out.reshape(*q.shape[:3], v.shape[3])
