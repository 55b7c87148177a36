"""Causal kernelised attention: segments of tokens pass a state `[R, Dv + 1]` on, S and as the column of a constant value 1, z.

A segment is cut into chunks, each reading the state before it and itself masked. Everything is in at least float32: the first rows
read so few keys that their gradients are small differences, which half-precision weights would lose. Segments are as long as a budget
of bytes allows and are computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from attnbench.eager import wide
from attnbench.stages import stage

from ._chunks import rows_per_chunk
from ._recompute import recomputed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ._kernelised import Normaliser

_CHUNK = 128
"""tokens a chunk: near D, where the states (N / C of R x Dv) and the products inside chunks (N / C of C x C) are alike in size"""
_COPIES = 8
"""wide tensors of the size of the features that are alive at once in a segment"""


@dataclass(frozen=True)
class Features:
    """Feature maps of a segment of tokens."""

    width: int
    """R"""
    of: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor]]
    """`(q [B, H, n, D], k [B, Hkv, n, D], positions [n], memory)` -> features `[B, H, n, R]` and `[B, Hkv, n, R]` in at least float32,
    a factor `[B, H, R, 1]` of the state before the segment (None is 1), and the memory for the next segment; the first one's is empty"""
    projects: bool = False
    """whether features are products, a stage of their own"""

    @classmethod
    def plain(cls, width: int, query: Callable[[Tensor, Tensor], Tensor], key: Callable[[Tensor, Tensor], Tensor]) -> Features:
        """Maps `(x, positions)` that need to know nothing of earlier tokens."""
        return cls(width, lambda q, k, at, memory: (query(q, at), key(k, at), None, memory))


def causal(q: Tensor, k: Tensor, v: Tensor, features: Features, norm: Normaliser) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`."""
    row_bytes = _COPIES * q.shape[0] * q.shape[1] * (features.width + v.shape[3]) * wide(q[..., :0]).element_size()
    length = max(_CHUNK, rows_per_chunk(q, row_bytes))
    segment = partial(_segment, features=features, norm=norm)
    memory = wide(q[..., :0])
    state, outputs = memory.new_zeros(*q.shape[:2], features.width, v.shape[3] + 1), []
    positions = torch.arange(q.shape[2], device=q.device).split(length)
    for *part, at in zip(*(torch.split(x, length, 2) for x in (q, k, v)), positions, strict=True):
        run = recomputed if q.shape[2] > length else _plain
        out, state, memory = run(segment, part, at, state, memory)
        outputs.append(out)
    return torch.cat(outputs, 2)


def _plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _segment(
    qkv: Sequence[Tensor], at: Tensor, state: Tensor, memory: Tensor, *, features: Features, norm: Normaliser
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a segment, the state after it, and what its feature maps remember."""
    q, k, v = qkv
    groups = q.shape[1] // k.shape[1]
    with stage("project" if features.projects else "state"):
        query, key, factor, memory = features.of(q, k, at, memory)
    with stage("state"):
        value = _cut(pad(wide(v), (0, 1), value=1.0)).repeat_interleave(groups, 1)  # rows added by the cut are zero: no weight
        query, key = _cut(query), _cut(key).repeat_interleave(groups, 1)
        before = state if factor is None else factor * state
        states = torch.cat([before.unsqueeze(2), key.transpose(-1, -2) @ value], 2).cumsum(2)  # [B, H, chunks + 1, R, Dv + 1]
    with stage("attend"):
        mixed = query @ states[:, :, :-1] + (query @ key.transpose(-1, -2)).tril() @ value
        mixed = mixed.flatten(2, 3)[:, :, : q.shape[2]]
        return (mixed[..., :-1] / norm(mixed[..., -1:], at[:, None] + 1)).to(q.dtype), states[:, :, -1], memory


def _cut(x: Tensor) -> Tensor:
    """`[B, H, n, X]` -> `[B, H, chunks, C, X]`, the last chunk filled with zeros."""
    full = pad(x, (0, 0, 0, -x.shape[2] % _CHUNK))
    return full.reshape(*x.shape[:2], -1, _CHUNK, x.shape[3])
