"""The compressed keys and values of NSA: overlapping blocks of tokens, each folded to one row by a mean or by a learned MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ._constants import constant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.method import Shape, Weights

    from .nsa import NsaParams


def members(keys: int, params: NsaParams) -> list[int]:
    """Tokens in each compressed block: l, but for a last one that the end of the sequence may cut short. Every token is in one."""
    count = -(-max(keys - params.compress, 0) // params.stride) + 1
    return [min(params.compress, keys - b * params.stride) for b in range(count)]


def ends(keys: int, params: NsaParams, device: torch.device) -> Tensor:
    """`[C]` last token of each block, beyond the sequence where it is cut short: no causal query sees such a block."""
    return torch.arange(len(members(keys, params)), device=device) * params.stride + params.compress - 1


def compressed(k: Tensor, v: Tensor, params: NsaParams, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys `[B, Hkv, C, D]` and values `[B, Hkv, C, Dv]`, rounded once to the type of k."""
    if params.phi == "mean":
        return _means(k, params), _means(v, params)
    return _mlp(k, "k", params, weights), _mlp(v, "v", params, weights)


def _means(x: Tensor, params: NsaParams) -> Tensor:
    """Sums of strides, then of as many strides as a block has."""
    dtype, covers = torch.promote_types(x.dtype, torch.float32), params.compress // params.stride
    count = len(members(x.shape[2], params))
    steps = count + covers - 1
    padded = pad(x, (0, 0, 0, max(0, steps * params.stride - x.shape[2])))[:, :, : steps * params.stride]
    strides = padded.unflatten(2, (steps, params.stride)).sum(3, dtype=dtype)
    total = sum(strides[:, :, n : n + count] for n in range(covers))
    assert isinstance(total, Tensor)
    lengths = constant(lambda: _lengths(x, count, params), x.device, "nsa", x.shape[2], count, params.stride, params.compress)
    return (total / lengths).to(x.dtype)


def _lengths(x: Tensor, count: int, params: NsaParams) -> Tensor:
    """Tokens of each block `[C, 1]`, made on the device: a copy from the host would end the capture of a graph."""
    first = torch.arange(count, device=x.device) * params.stride
    return (x.shape[2] - first).clamp(max=params.compress)[:, None]


def _mlp(x: Tensor, name: str, params: NsaParams, weights: Mapping[str, Tensor]) -> Tensor:
    """`W2 relu(W1 (rows + positions) + b1) + b2` of the rows of each block, side by side."""
    first = torch.arange(len(members(x.shape[2], params)), device=x.device) * params.stride
    token = first[:, None] + torch.arange(params.compress, device=x.device)
    rows = x[:, :, token.clamp(max=x.shape[2] - 1)] + weights[f"{name}_position"].unsqueeze(1)
    flat = rows.masked_fill((token >= x.shape[2]).unsqueeze(-1), 0.0).flatten(3)
    hidden = linear(flat, weights[f"{name}_w1"], weights[f"{name}_b1"]).relu()
    return linear(hidden, weights[f"{name}_w2"], weights[f"{name}_b2"])


def draw_phi(shape: Shape, params: NsaParams, generator: torch.Generator) -> Weights:
    """For k and v: `position [Hkv, l, D]`, zero; `w1 [l D, l D]`, `b1`, `w2 [D, l D]` and `b2`, uniform within `(l D)^-1/2`."""
    drawn: Weights = {}
    for name, dim in (("k", shape.dim), ("v", shape.dim_v)):
        inputs = params.compress * dim
        drawn[f"{name}_position"] = torch.zeros(shape.kv_heads, params.compress, dim, dtype=torch.float64)
        for part, size in (("w1", (inputs, inputs)), ("b1", (inputs,)), ("w2", (dim, inputs)), ("b2", (dim,))):
            drawn[f"{name}_{part}"] = (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1) * inputs**-0.5
    return drawn


def phi_flops(shape: Shape, params: NsaParams) -> int:
    """Multiply-adds of both MLPs of one key head, 2 FLOP each."""
    count = len(members(shape.keys, params))
    return sum(2 * count * (params.compress * dim) * (params.compress * dim + dim) for dim in (shape.dim, shape.dim_v))
