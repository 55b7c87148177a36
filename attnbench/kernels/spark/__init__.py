"""Spark attention in Triton: keys whose predicted score reaches a threshold, weighted by a softmax times a gate; forward and backward.

`u_ij = q_i[:r] . k_j[:r]`, `T_i = {j : u_ij >= min(limit_i, max_j u_ij)}`,
`o_i = sum_{j in T_i} softmax_{j in T_i}(scale u_ij) softplus(scale_s q_i[r:] . k_j[r:]) v_j`. `spark_statistics` gives a causal query's
mean score and its sum of squared deviations, merged block by block. Thresholds carry no gradient. Two ways to the same result:

`spark_attention`: every pair is scored, as in flash attention, and scores below the threshold weigh nothing: where none reaches it, only
the largest so far counts, and what counted before is dropped. Work of a head: `2 N M (D + Dv)` FLOP forward, `2 N M (6 D + 3 Dv)`
backward, in two kernels that each compute the scores again; two exponentials and a logarithm a pair each time. Bytes: inputs, output and
gradients as in flash attention. Kept beside inputs and output: `8 N` bytes a head, the log-sum-exp and the threshold used. Every sum has
a fixed order.

`spark_listed`: one pass over pairs finds the keys that reach a query's threshold, and only these are read again. The first kernel scores
every pair in the R dimensions that predict and lists the keys kept, at most L a query, in order. Two kernels then gather them, forward
and backward: a query costs what it keeps. Where a tile of 64 queries has one that keeps more than L keys, or none, so that the largest
counts, the kernels of `spark_attention` take that tile, forward and backward, as they would take all; nothing is read back. Work of a
head: `2 N M R` FLOP to find the keys, then `2 N K (D + Dv)` forward and `2 N K (3 D + 2 Dv)` backward for K kept. Kept beside inputs and
output: `4 N (L + 2)` bytes a head. dk and dv are added up atomically, in no fixed order: they differ in the last bits from call to call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._list_operator import listed_forward
from ._operator import spark_forward, spark_statistics

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["spark_attention", "spark_listed", "spark_statistics", "supported"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIM = 128


def supported(dim: int, dim_v: int, dtype: torch.dtype) -> list[str]:
    """Why such a call cannot be run; empty means it can."""
    checks = (
        (dtype not in DTYPES, f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"),
        (max(dim, dim_v) > MOST_DIM, f"takes head dimensions up to {MOST_DIM}, not {max(dim, dim_v)}"),
        (dim < 2, f"D = {dim} cannot be split in two"),
    )
    return [reason for fails, reason in checks if fails]


def spark_attention(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, *, causal: bool = False
) -> Tensor:
    """`q: [B, H, N, D]`, `k: [B, Hkv, M, D]`, `v: [B, Hkv, M, Dv]`, thresholds `limit: [B, H, N]` (float32) -> `[B, H, N, Dv]`.

    The first `predictor` dimensions predict. Raises ValueError where the call is not supported.
    """
    reasons = supported(q.shape[3], v.shape[3], q.dtype)
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0
    if not fits or limit.shape != q.shape[:3] or not q.dtype == k.dtype == v.dtype or not 0 < predictor < q.shape[3]:
        reasons.append(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, limit {list(limit.shape)}, predictor {predictor} do not fit"
        )
    if reasons:
        raise ValueError("; ".join(reasons))
    out: Tensor = spark_forward(q, k, v, limit, predictor, scale, scale_s, causal)[0]
    return out


def spark_listed(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor, predictor: int, scale: float, scale_s: float, longest: int, *, causal: bool = False
) -> Tensor:
    """As `spark_attention`, by lists of up to `longest` keys a query."""
    if q.dtype not in DTYPES or not 0 < predictor < q.shape[3] or longest < 1:
        raise ValueError(f"cannot list keys of {q.dtype} queries {list(q.shape)} by {predictor} dimensions in lists of {longest}")
    out: Tensor = listed_forward(q, k, v, limit, predictor, scale, scale_s, longest, causal)[0]
    return out
