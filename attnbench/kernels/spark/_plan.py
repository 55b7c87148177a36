"""Sizes of tiles and constants of the kernels, from the shape alone: nothing is tuned at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .._define import power

if TYPE_CHECKING:
    from torch import Tensor

TILE = 64
"""queries a tile of the kernel that lists"""


def width(d: int) -> int:
    """Columns that a product of tensor cores takes for d."""
    return max(16, power(d))


def pair_constants(q: Tensor, k: Tensor, v: Tensor, predictor: int, *, causal: bool, backward: bool) -> dict[str, Any]:
    """Constants of the kernels of pairs: tiles of 64 queries and keys, smaller where rows are wide and where registers run out."""
    r, s, dv, fp32 = predictor, q.shape[3] - predictor, v.shape[3], q.dtype == torch.float32
    big = max(q.shape[3], dv) > 64
    return {
        "G": q.shape[1] // k.shape[1], "R": r, "S": s, "DV": dv, "BR": width(r), "BS": width(s), "BDV": width(dv),
        "BQ": 32 if backward and fp32 else 64, "BN": 32 if fp32 or big else 64, "CAUSAL": causal, "PREC": "tf32x3" if fp32 else "tf32",
        "num_warps": 8 if backward and big else 4, "num_stages": 2 if backward or fp32 else 3,
    }  # fmt: skip


def list_constants(q: Tensor, k: Tensor, v: Tensor, predictor: int, longest: int) -> dict[str, Any]:
    """Constants of the kernels that gather: tiles of as many keys as make 4096 numbers."""
    r, s, dv = predictor, q.shape[3] - predictor, v.shape[3]
    br, bs, bdv = (power(x) for x in (r, s, dv))
    return {
        "G": q.shape[1] // k.shape[1], "R": r, "S": s, "DV": dv, "BR": br, "BS": bs, "BDV": bdv, "L": longest, "TQ": TILE,
        "BK": min(64, power(longest), max(8, 4096 // max(br + bs, bdv))), "num_warps": 2,
    }  # fmt: skip
