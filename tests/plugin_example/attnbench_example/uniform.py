"""Uniform attention: every query reads every key with the same weight, `o_i = mean_j v_j`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import expand_heads
from attnbench.fastweights import Bank, FastWeights
from attnbench.method import Citation, Cost, Limits, Method, Params, Shape
from attnbench.taxonomy import Construction, Coordinates, Count, Expert, Scaling, Topology

if TYPE_CHECKING:
    from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, params: Params, rows: Tensor | None = None) -> Tensor:
    """The definition."""
    _, values = expand_heads(q, k, v)
    size = q.shape[2] if rows is None else len(rows)
    return values.mean(2, keepdim=True).expand(-1, -1, size, -1) + 0 * q[..., :size, :1]


def experts(q: Tensor, k: Tensor, v: Tensor, params: Params) -> FastWeights:
    """One hidden unit: the mean of the values, behind a first layer of zeros."""
    _, values = expand_heads(q, k, v)
    mean = values.mean(2, keepdim=True).unsqueeze(2)
    return FastWeights((Bank(w1=torch.zeros(*mean.shape[:4], q.shape[-1], dtype=q.dtype), w2=mean),))


def cost(shape: Shape, params: Params) -> Cost:
    """One addition an element of v."""
    return Cost.of(shape, {"pool": shape.batch * shape.kv_heads * shape.keys * shape.dim_v})


METHOD = Method(
    name="uniform",
    title="Uniform",
    coordinates=Coordinates(Scaling.COMPRESSION, Expert.MLP, Count.SHARED, Construction.LEARNABLE_PROJECTION, Topology.ALL_TO_ONE),
    citation=Citation("Nobody", 2026, "The mean of the values", "https://example.org"),
    params=Params,
    reference=reference,
    experts=experts,
    cost=cost,
    limits=Limits(cross=True, no_causal="the mean runs over all keys"),
)
