"""DAT in practice: offsets computed again in the backward pass, few rows of k and v gathered, and never N x N_s biases at once.

Beside q, k, v and the output, N tokens hold the offset network's copies of q while it runs, about three in at least float32, and in the
backward pass gradients of k and v in at least float32; what is kept for the backward pass grows with N_s alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import masked_softmax, positions, wide
from attnbench.sdpa import attention
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._recompute import recomputed
from ._sampling import corners, mix
from .dat import displacements, on_grid, places

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .dat import DatParams

_RUN = 4096
"""queries of a run"""
_COPIES = 24
"""numbers for each query and point that are alive at once while biases are made"""


def sdpa(q: Tensor, k: Tensor, v: Tensor, params: DatParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`."""
    sides = params.sides(q.shape[2])
    own = {name: wide(x) for name, x in weights.items()}
    with stage("project"):
        place = recomputed(places, q, params, own)
    with stage("gather"):
        index, shares = corners(*on_grid(place, sides), sides)
        keys, values = mix(k, index, shares), mix(v, index, shares)
    with stage("attend"):
        if not params.bias:
            return _attend(q, keys, values)
        size = rows_per_chunk(q, _COPIES * keys[..., 0].numel() * own["table"].element_size())
        tokens = own["table"].flatten(1).unsqueeze(-1).expand(len(q), -1, -1, -1)
        parts = zip(q.split(size, 2), positions(q, None).split(size), strict=True)
        return torch.cat([recomputed(_biased, part, rows, (keys, values, place, tokens), params, q.shape[2]) for part, rows in parts], 2)


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention to few keys: runs of queries are heads of their own, since flash attention's backward pass gives one program all queries
    of a block of keys, which would leave most of a GPU idle."""
    n = q.shape[2]
    runs = next(r for r in range(max(1, n // _RUN), 0, -1) if n % r == 0)
    query: Tensor = q.unflatten(2, (runs, -1)).flatten(1, 2)
    out = attention(query, keys.repeat_interleave(runs, 1), values.repeat_interleave(runs, 1))
    return out.reshape(*q.shape[:3], -1)


def _biased(q: Tensor, rows: Tensor, held: tuple[Tensor, Tensor, Tensor, Tensor], params: DatParams, n: int) -> Tensor:
    """Outputs of a chunk of queries at positions `rows` of N."""
    keys, values, place, tokens = held
    height, width = params.sides(n)
    index, shares = corners(*displacements(rows, place, params, n), (2 * height - 1, 2 * width - 1))
    bias = mix(tokens, index.flatten(2, 3), shares.flatten(2, 3)).view(index.shape[:-1])
    logits = q.shape[-1] ** -0.5 * wide(q @ keys.transpose(-1, -2)) + bias
    return masked_softmax(logits).to(values.dtype) @ values
