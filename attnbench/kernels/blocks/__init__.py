"""Attention to chosen blocks of keys in Triton, forward and backward: for MoBA, the selected branch of NSA, BRA and windows.

Two forms. `attend_blocks`: each query chooses S blocks of consecutive keys; pairs of query and block are sorted by block, one
program takes a run of pairs of one block, and the S partial outputs of a query are merged. `attend_regions`: tokens are cut into
regions that choose S regions together; one program takes a tile of a region's queries, and there are no partial results. Both have
one softmax over all that a query reads. Gradients of keys and values are sums over the pairs of their block, in runs, in both forms.
`route_blocks` makes the choice of the first form by one row a block, without scores in memory. No copy of keys or queries in another
order is made: kernels gather rows by their tokens. Every sum has a fixed order: the same input gives the same output bit for bit;
nothing is read back from the device.

Work of one head, N queries, blocks of W keys: forward `2 N S W (D + Dv)` FLOP, backward 2.5 times that and the products of the queries'
scores once more. Bytes: pairs read q S times and write and read `4 N S (Dv + 1)` bytes of partial outputs, at most `PART_BYTES` at a
time; regions read q once and k and v S times, from L2 as far as they fit. Kept for the backward pass beyond q, k, v and the output: `4 N`
bytes a head of log-sum-exps, `4 N S` a route head of sorted pairs, and the output's rounding errors in its own type: gradients of scores
are differences of `grad . v` and `grad . output`, small ones where a key carries a softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._define import misfits
from ._operator import blocks_forward
from ._route import route_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attend_blocks", "attend_regions", "route_blocks", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 128


def supported(q: Tensor, k: Tensor, v: Tensor, pairs: int, blocks: int) -> list[str]:
    """Why these tensors cannot be run with so many pairs and blocks, those of all route heads together; empty means they can."""
    checks = (
        *misfits(q, k, v, DTYPES, MOST_DIM),
        (max(2 * pairs, blocks) >= 2**31, f"{pairs} pairs of query and block exceed 32-bit indices"),
    )
    return [reason for fails, reason in checks if fails]


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, block: int, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention of each query to the blocks of `block` keys that it chose: `q [B, H, N, D]` -> `[B, H, N, Dv]`.

    `routes [B, Hr, N, S]` names the blocks, -1 for none, each at most once; a route head serves `H / Hr` heads that follow one another.
    Causal: keys after the query are hidden. A query that reads nothing has output 0. `scale` defaults to `D ** -0.5`. Strided inputs are
    read in place where the innermost stride is 1. Raises ValueError where the call is not supported.
    """
    if routes.shape[:1] != q.shape[:1] or q.shape[1] % routes.shape[1] or routes.shape[2] != q.shape[2]:
        raise ValueError(f"routes {list(routes.shape)} do not fit queries {list(q.shape)}")
    if max(routes.shape[1], k.shape[1]) % min(routes.shape[1], k.shape[1]):
        raise ValueError(f"{routes.shape[1]} route heads and {k.shape[1]} key heads do not divide one another")
    _check(supported(q, k, v, routes.numel(), routes.shape[0] * routes.shape[1] * -(-k.shape[2] // block)))
    return blocks_forward(q, k, v, _int32(routes), None, block, scale or q.shape[-1] ** -0.5, causal)[0]


def attend_regions(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, members: Tensor, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention of the queries of each region to the regions that it chose: `q [B, H, N, D]` -> `[B, H, N, Dv]`.

    `members [E, W]` holds the tokens of each region, -1 where it is short; every token is in one. `chosen [B, E, S]` names regions, -1 for
    none, each at most once; all heads share it. Causal, scale and strides as in `attend_blocks`.
    """
    if chosen.shape[:2] != (q.shape[0], members.shape[0]) or q.shape[2] != k.shape[2]:
        raise ValueError(f"regions {list(members.shape)} and choices {list(chosen.shape)} do not fit queries {list(q.shape)}")
    _check(supported(q, k, v, chosen.numel() * members.shape[1], chosen.shape[0] * members.shape[0]))
    routes, tokens = _int32(chosen.unsqueeze(1)), _int32(members)
    return blocks_forward(q, k, v, routes, tokens, members.shape[1], scale or q.shape[-1] ** -0.5, causal)[0]


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _check(reasons: list[str]) -> None:
    if reasons:
        raise ValueError("; ".join(reasons))
