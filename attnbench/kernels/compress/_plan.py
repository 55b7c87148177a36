"""What a call selects, and the constants of the kernels that attend, from the shape alone: nothing is tuned at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._define import power

if TYPE_CHECKING:
    from torch import Tensor


class Selection(NamedTuple):
    """What is compressed, and how blocks of tokens are chosen."""

    keys: int
    """tokens"""
    length: int
    """tokens of a compressed key"""
    stride: int
    """tokens from one compressed key to the next; divides length and block"""
    block: int
    """tokens of a block, at least `length`"""
    topk: int
    """blocks that each query keeps; all where there are fewer"""
    first: int
    """first blocks that are always kept"""
    local: int
    """blocks that are always kept: the query's own and those before it"""
    causal: bool

    @property
    def blocks(self) -> int:
        """E."""
        return -(-self.keys // self.block)


def plan(q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, Any], int]:
    """Constants of every kernel that attends, and warps."""
    d, dv, fp32 = q.shape[3], v.shape[3], q.dtype == torch.float32
    dim, dim_v = max(16, power(d)), max(16, power(dv))
    big = max(dim, dim_v) > 64
    sizes = {"G": q.shape[1] // k.shape[1], "D": d, "DV": dv, "T": 32 if fp32 else 64, "BK": 32 if fp32 else 64, "BD": dim, "BDV": dim_v,
             "PREC": "tf32x3" if fp32 else "tf32"}  # fmt: skip
    return sizes, 8 if big and not fp32 else 4
