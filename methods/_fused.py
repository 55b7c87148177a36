"""The fused Triton kernels behind `mita` and `agent`: parameters turned into a call of `attnbench.kernels.mita`."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from attnbench.method import Implementation, Limits, Params, Shape

from ._landmarks import LandmarkParams

if TYPE_CHECKING:
    from torch import Tensor

    from .mita import MitaParams

DTYPES = ("bfloat16", "float16", "float32")

STAGES = {
    "pool": ("pool_kernel",),
    "probe": ("probe_kernel",),
    "select": ("select_kernel",),
    "route": ("gate_kernel",),
    "permute": ("permute_kernel",),
    "attend": ("attend_kernel",),
    "merge": ("merge_kernel",),
    "attend gradient": ("query_grad_kernel", "shared_grad_kernel", "sum_landmark_kernel", "routed_grad_kernel"),
    "probe gradient": ("probe_grad_kernel", "sum_probe_kernel"),
    "gather gradient": ("rank_kernel", "mark_kernel", "link_kernel", "scatter_kernel"),
    "pool gradient": ("bins_kernel", "finish_kernel"),
}
"""Stage -> names of its kernels; in the forward pass keys are gathered where they are attended to, their gradients are scattered apart."""


def mita(q: Tensor, k: Tensor, v: Tensor, params: MitaParams) -> Tensor:
    """MiTA, every stage in fused kernels."""
    from attnbench.kernels.mita import mita_attention

    return mita_attention(
        q,
        k,
        v,
        **_pooling(q.shape[2], params),
        topk=params.topk,
        experts_per_query=params.experts_per_query,
        shared=params.shared,
        routed=params.routed,
        shared_scale=params.landmark_factor(q.shape[-1]),
    )


def agent(q: Tensor, k: Tensor, v: Tensor, params: LandmarkParams) -> Tensor:
    """Agent attention: MiTA's shared expert alone, with the scale 1/sqrt(D) on both sides."""
    from attnbench.kernels.mita import mita_attention

    return mita_attention(q, k, v, **_pooling(q.shape[2], params), topk=1, routed=False, shared_scale=q.shape[-1] ** -0.5)


def _pooling(n: int, params: LandmarkParams) -> dict[str, Any]:
    """`landmarks`, `grid` and `prefix` of the kernels; a shifted grid starts at the first token."""
    if params.grid == "none":
        return {"landmarks": params.landmarks, "prefix": params.prefix}
    side = isqrt(params.landmarks)
    prefix = 0 if params.legacy_cls_shift else params.prefix
    return {"landmarks": (side, side), "grid": params.sides(n - params.prefix), "prefix": prefix}


def implementation(name: str) -> Implementation:
    """`triton` of the method `name`. The kernels' own answer to what they take is asked for once a GPU is at hand."""
    return Implementation(
        "triton",
        f"attnbench.methods._fused:{name}",
        Limits(("cuda",), DTYPES, cross=True, extra=_refused),
        requires=("triton",),
        operators=("attnbench::mita_forward",),
        note="every stage in fused kernels",
        stages=STAGES,
    )


def _refused(shape: Shape, params: Params, dtype: torch.dtype, device: str) -> list[str]:
    if device != "cuda" or not isinstance(params, LandmarkParams):
        return []
    from attnbench.kernels.mita import supported

    q, k, v = (
        torch.empty(shape.batch, heads, length, dim, dtype=dtype, device="meta")
        for heads, length, dim in (
            (shape.heads, shape.n, shape.dim),
            (shape.kv_heads, shape.keys, shape.dim),
            (shape.kv_heads, shape.keys, shape.dim_v),
        )
    )
    names = ("topk", "experts_per_query", "shared", "routed")
    own = {name: getattr(params, name) for name in names if hasattr(params, name)} or {"topk": 1, "routed": False}
    return supported(q, k, v, params.landmarks, **own)
