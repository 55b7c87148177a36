"""Causal linear attention: segments of tokens pass a state `[D, Dv + 1]` on, S and as the column of a constant value 1, z.

A segment is cut into chunks, each reading the state before it and itself masked. Everything is in at least float32: the first rows
read so few keys that their gradients are small differences, which half-precision weights would lose. Segments are as long as a budget
of bytes allows and are computed again in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from attnbench.eager import wide

from ._chunks import rows_per_chunk
from .linear import EPS, feature

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_CHUNK = 128
"""tokens a chunk: near D, where the states (N / C of D x Dv) and the products inside chunks (N / C of C x C) are alike in size"""
_COPIES = 8
"""wide tensors of the size of q that are alive at once in a segment"""


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`."""
    row_bytes = _COPIES * q.shape[0] * q.shape[1] * (q.shape[3] + v.shape[3]) * wide(q[..., :0]).element_size()
    length = max(_CHUNK, rows_per_chunk(q, row_bytes))
    run = _recomputed if q.shape[2] > length else _plain
    state = wide(q[..., :0]).new_zeros(*q.shape[:2], q.shape[3], v.shape[3] + 1)
    outputs = []
    for part in zip(*(torch.split(x, length, 2) for x in (q, k, v)), strict=True):
        out, state = run(_segment, *part, state)
        outputs.append(out)
    return torch.cat(outputs, 2)


def _plain(function: Callable[..., Any], *args: Tensor) -> Any:
    return function(*args)


def _recomputed(function: Callable[..., Any], *args: Tensor) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _normalised(mixed: Tensor) -> Tensor:
    return mixed[..., :-1] / (mixed[..., -1:] + EPS)


def _segment(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a segment, and the state after it."""
    groups = q.shape[1] // k.shape[1]
    value = _cut(pad(wide(v), (0, 1), value=1.0)).repeat_interleave(groups, 1)  # rows added by the cut are zero: no weight
    query, key = _cut(feature(q)), _cut(feature(k)).repeat_interleave(groups, 1)
    states = torch.cat([state.unsqueeze(2), key.transpose(-1, -2) @ value], 2).cumsum(2)  # [B, H, chunks + 1, D, Dv + 1]
    mixed = query @ states[:, :, :-1] + (query @ key.transpose(-1, -2)).tril() @ value
    return _normalised(mixed).flatten(2, 3)[:, :, : q.shape[2]].to(q.dtype), states[:, :, -1]


def _cut(x: Tensor) -> Tensor:
    """`[B, H, n, X]` -> `[B, H, chunks, C, X]`, the last chunk filled with zeros."""
    full = pad(x, (0, 0, 0, -x.shape[2] % _CHUNK))
    return full.reshape(*x.shape[:2], -1, _CHUNK, x.shape[3])
