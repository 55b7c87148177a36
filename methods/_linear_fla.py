"""Causal linear attention by the package flash-linear-attention: its unnormalised sums, of values and of a constant 1 beside them.

Its own normaliser adds another eps and sums keys in half precision; the constant's sum is the denominator of the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fla.ops.linear_attn import chunk_linear_attn
from torch.nn.functional import pad

from attnbench.stages import stage

from ._optional import installed
from .linear import NORM, feature

if TYPE_CHECKING:
    from torch import Tensor

    from .linear import LinearParams


def attention(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> Tensor:
    """`q: [B, N, H, D]` -> `[B, N, H, Dv]`. Features are rounded to the dtype of q."""
    assert params.causal
    groups, width = q.shape[2] // k.shape[2], v.shape[3]
    with stage("state"):
        query, key = feature(q).to(q.dtype), feature(k).to(k.dtype).repeat_interleave(groups, 2)
        value = pad(pad(v, (0, 1), value=1.0), (0, -(width + 1) % 8)).repeat_interleave(groups, 2)
    with stage("attend"):
        mixed: Tensor = chunk_linear_attn(query, key, value, scale=1.0, normalize=False)[0]
        return mixed[..., :width] / NORM(mixed[..., width : width + 1], 0)


def witness(q: Tensor, k: Tensor, v: Tensor, params: LinearParams) -> str:  # noqa: ARG001
    """The package and its version."""
    return installed("fla-core")
