"""ViT^3 in chunks of tokens, in at least float32; each chunk is computed again in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._products import outer_sum
from ._recompute import recomputed
from .vit3 import conv_branch, outer_factors, read, step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .vit3 import Vit3Params

_COPIES = 10
"""tensors of the size of q, in at least float32, that are alive at once in a chunk"""


def chunked(q: Tensor, k: Tensor, v: Tensor, params: Vit3Params, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`."""
    w1, w2 = wide(weights["w1"]), wide(weights["w2"])
    width = q.shape[0] * q.shape[1] * max(q.shape[3], v.shape[3])
    size = rows_per_chunk(q, _COPIES * width * w1.element_size())
    with stage("state"):
        g1, g2 = torch.zeros_like(w1), torch.zeros_like(w2)
        for key, value in zip(k.split(size, 2), v.split(size, 2), strict=True):
            a, b = recomputed(_learned, key, value, w1, w2)
            g1, g2 = g1 - a / k.shape[2], g2 - b / k.shape[2]
        w1, w2 = step(w1, g1, params.lr), step(w2, g2, params.lr)
    with stage("attend"):
        dtype = w1.dtype if params.conv else v.dtype  # a sum is rounded once
        out = torch.cat([recomputed(_read, part, w1, w2, dtype) for part in q.split(size, 2)], 2)
        return (out + recomputed(conv_branch, q, k, v, params, weights)).to(v.dtype) if params.conv else out


def _learned(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor) -> list[Tensor]:
    """Sums over a chunk of what the gradients are made of, `[B, H, D, Dv]` each."""
    key, value = (x.repeat_interleave(w1.shape[0] // k.shape[1], 1) for x in (wide(k), wide(v)))
    return [outer_sum(key, x) for x in outer_factors(key, value, w1, w2)]


def _read(q: Tensor, w1: Tensor, w2: Tensor, dtype: torch.dtype) -> Tensor:
    return read(wide(q), w1, w2).to(dtype)
