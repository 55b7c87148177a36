"""Kernelised attention: `o_i = sum_j (phi(q_i) . phi(k_j)) v_j / n(sum_j phi(q_i) . phi(k_j))`, from features to outputs, banks and costs.

Features are not negative, so that keys and values fold into one matrix `S = sum_j phi(k_j)^T v_j` and one vector `z = sum_j phi(k_j)`.
What the definitions of such methods share is here; a method adds its feature maps, each `[B, H, N, D]` -> `[B, H, N, R]` in at least
float32. Causal, the sums run over j <= i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbench.eager import causal_mask, expand_heads
from attnbench.fastweights import Bank
from attnbench.method import Cost, Implementation, Limits, Params, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Normaliser:
    """What a query divides by, from the sum of its weights: `max(sum + add, least)`."""

    add: float = 0.0
    least: float = 0.0
    """0 sets no bound"""
    mean: bool = False
    """whether `add` is added to the mean weight of a key, so that it counts once for each key read"""

    def __call__(self, total: Tensor, keys: Tensor | int) -> Tensor:
        """From sums over `keys` keys."""
        count = keys.to(total.dtype) if isinstance(keys, Tensor) else keys
        total = total + self.add * (count if self.mean else 1)
        return total.clamp(min=self.least) if self.least else total


def attend(query: Tensor, key: Tensor, value: Tensor, norm: Normaliser, rows: Tensor | None = None) -> Tensor:
    """`[B, H, N, Dv]` from features `[B, H, N, R]`, `[B, Hkv, M, R]` and values; causal where `rows`, the queries' positions, are given.

    Causal as the masked product `(phi(q) phi(k)^T) v`, row by row the same sums.
    """
    if rows is not None:
        key, value = expand_heads(query, key, value)
        weights = (query @ key.transpose(-1, -2)).masked_fill(~causal_mask(rows, key.shape[2]), 0.0)
        return weights @ value / norm(weights.sum(-1, keepdim=True), rows[:, None] + 1)
    state, total = expand_heads(query, key.transpose(-1, -2) @ value, key.sum(2).unsqueeze(-1))
    return query @ state / norm(query @ total, key.shape[2])


def bank(query_map: Callable[[Tensor, Tensor], Tensor], key: Tensor, value: Tensor, *, causal: bool) -> Bank:
    """One shared expert with linear hidden units, from key features and values of H heads.

    Bidirectional: R compressed units, unit r with weights `z_r e_r` and `S_r / z_r`, so that hidden units sum to the denominator.
    Causal, where each query has sums of its own: one unit a token, `phi(k_j)` and `v_j`, the future hidden.
    """
    if causal:
        index = torch.arange(key.shape[2], device=key.device).expand(*key.shape[:2], 1, -1)
        return Bank(key, value, index, activation="linear", query_map=query_map, causal=True)
    total = key.sum(2).clamp(min=torch.finfo(key.dtype).tiny)
    state = key.transpose(-1, -2) @ value / total.unsqueeze(-1)
    return Bank(w1=torch.diag_embed(total).unsqueeze(2), w2=state.unsqueeze(2), activation="linear", query_map=query_map)


def mean_map(query_map: Callable[[Tensor, Tensor], Tensor], *, causal: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """`query_map` for a denominator of means: causal, query i reads i + 1 keys, so that its features are divided by as many."""
    return (lambda q, rows: query_map(q, rows) / (rows[:, None] + 1)) if causal else query_map


def cost(shape: Shape, features: int, *, reads: int = 1, project: Mapping[str, int] | None = None, learned: int = 0) -> Cost:
    """2 M R Dv FLOP a key head for S and M R for z; 2 N R Dv a query head to read S and 2 N R for each of `reads` denominators.

    Causal the same. `project` has the FLOP of products that make features or follow the output; `learned` is elements of weights.
    """
    keys, queries = shape.batch * shape.kv_heads * shape.keys, shape.batch * shape.heads * shape.n
    flops = {
        **(project or {}),
        "state": 2 * keys * features * shape.dim_v,
        "pool": keys * features,
        "read": 2 * queries * features * shape.dim_v,
        "normalise": 2 * reads * queries * features,
    }
    state = shape.batch * shape.kv_heads * features * (shape.dim_v + 1)
    both = {"state": keys * (shape.dim + shape.dim_v) + state, "read": queries * (shape.dim + shape.dim_v) + state}
    return Cost.of(shape, flops, extra=state + learned, recomputes=False, traffic=both)


def implementations(name: str, chunked: Limits, fused: Limits) -> tuple[Implementation, Implementation]:
    """`triton` and `chunked` of the method `name`: the same, but that the former has its feature maps in kernels."""
    maps = replace(
        fused, devices=("cuda",), dtypes=("float32", "bfloat16", "float16"), no_causal="features of prefix sums are those of `chunked`"
    )
    return (
        Implementation(
            "triton",
            f"attnbench.methods._fused_features:{name}",
            maps,
            requires=("triton",),
            note="features in one pass each, made anew in the backward pass",
        ),
        Implementation(
            "chunked",
            f"attnbench.methods._{name}:chunked",
            chunked,
            note="features made anew in the backward pass; causal by prefix states of chunks",
        ),
    )


def causal_cross(shape: Shape, params: Params, _dtype: torch.dtype, _device: str) -> list[str]:
    """A limit of causal prefix sums: query i reads the keys up to i."""
    unequal = params.causal and shape.keys != shape.n
    return [f"causal, needs as many keys as queries, not {shape.keys} for {shape.n}"] if unequal else []
