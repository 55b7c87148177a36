"""Softmax attention: every query reads every key.

`o_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j`, equation 1 of Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
The implementations are the backends of torch.nn.functional.scaled_dot_product_attention, each forced and each checked to be the
one that ran.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbench.eager import attend, causal_mask, expand_heads, positions, take
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Implementation, Limits, Method, Params, Shape
from attnbench.sdpa import fills_tiles
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology


@dataclass(frozen=True, kw_only=True)
class SoftmaxParams(Params):
    """Softmax attention has no hyper-parameters of its own."""


def reference(q: Tensor, k: Tensor, v: Tensor, params: Params, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    k, v = expand_heads(q, k, v)
    mask = causal_mask(positions(q, rows), k.shape[2]) if params.causal else None
    return attend(take(q, rows), k, v, q.shape[-1] ** -0.5, mask)


def experts(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    """One shared expert as wide as the sequence."""
    k, v = expand_heads(q, k, v)
    index = torch.arange(k.shape[2], device=k.device).expand(*k.shape[:2], 1, -1)
    return FastWeights((Bank(k, v, index, scale=q.shape[-1] ** -0.5, causal=params.causal),))


def cost(shape: Shape, params: Params) -> Cost:
    """2 N M (D + Dv) FLOP a head; the lower triangle of it where causal."""
    pairs = shape.n * (shape.n + 1) // 2 if params.causal else shape.n * shape.keys
    heads = shape.batch * shape.heads
    flops = {"score": 2 * heads * pairs * shape.dim, "attend": 2 * heads * pairs * shape.dim_v}
    return Cost.of(shape, flops, traffic={"attend": Cost.once(shape)})


def _sdpa(name: str, limits: Limits, *operators: str, **more: Any) -> Implementation:
    return Implementation(name, f"attnbench.methods._sdpa:{name}", limits, operators=operators, **more)


def _partial_tiles(shape: Shape) -> list[str]:
    wrong = not fills_tiles(shape.n, shape.keys)
    return ["the gradient of q may be NaN where queries or keys are no multiple of 128 (pytorch 196678)"] if wrong else []


def _half_on_gpu(_shape: Shape, _params: Params, dtype: torch.dtype, device: str) -> list[str]:
    wrong = device == "cuda" and dtype.itemsize != 2
    return [f"takes {' and '.join(_HALF)} on cuda, not {str(dtype).removeprefix('torch.')}"] if wrong else []


_HALF = ("bfloat16", "float16")
METHOD = Method(
    name="softmax",
    title="Softmax",
    coordinates=Coordinates(Scaling.NONE, Expert.MLP, Count.SHARED, Construction.IDENTITY, Topology.ALL_TO_ONE),
    citation=Citation("Vaswani et al.", 2017, "Attention Is All You Need", "https://arxiv.org/abs/1706.03762", "NeurIPS"),
    params=SoftmaxParams,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True),
    implementations=(
        _sdpa(
            "cudnn",
            Limits(("cuda",), _HALF, max_dim=128, dim_multiple=8, cross=True),
            "aten::_scaled_dot_product_cudnn_attention",
            backward_reasons=_partial_tiles,
            note="with a backward pass it runs whole tiles of 128 queries and keys alone, unless pinned",
        ),
        _sdpa(
            "flash",
            Limits(max_dim=256, value_dim=False, cross=True, extra=_half_on_gpu),
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
        ),
        _sdpa("efficient", Limits(("cuda",), ("float32", *_HALF), gqa=False, cross=True), "aten::_scaled_dot_product_efficient_attention"),
        _sdpa("math", Limits(cross=True), "aten::_scaled_dot_product_attention_math"),
    ),
    exact=True,
)
