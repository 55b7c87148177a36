"""Settings and small inputs of block methods, for their tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbench.method import Method, Params, Shape

SMALL = {"compress": 8, "stride": 4, "block": 12, "topk": 4, "window": 9}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("block_window", {"window": 9}),
    ("block_window", {"window": 9, "bias": True}),
    ("block_window", {"grid": "line", "window": 7}),
    ("block_window", {"grid": "line", "window": 7, "bias": True, "causal": True}),
    ("block_window", {"grid": "line", "window": 7, "causal": True}),
    ("bra", {"region": 9, "topk": 3}),
    ("bra", {"region": 4, "topk": 5, "scale": "1/sqrt(d)", "lepe": 3}),
    ("bra", {"grid": "line", "region": 7, "topk": 2}),
    ("nsa", SMALL),
    ("nsa", SMALL | {"causal": True}),
    ("nsa", SMALL | {"phi": "mlp", "first": 0, "local": 0}),
    ("nsa", SMALL | {"phi": "mlp", "causal": True, "local": 1}),
    ("nsa", {"compress": 4, "stride": 4, "block": 4, "topk": 3, "window": 1, "causal": True}),
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in values.items())}" for name, values in SETTINGS]
PRACTICAL = {"block_window": "sdpa", "bra": "varlen", "nsa": "varlen"}


def tensors(n: int, kv_heads: int = 2, *, heads: int = 4, batch: int = 2, dim: int = 8, dim_v: int = 5, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim_v)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def settled(method: Method, values: dict[str, Any], qkv: list[Tensor]) -> Params:
    shape = Shape.of(*qkv)
    params = method.parse(values).fitted(shape)
    assert params.problems(shape) == []
    return params


def stirred(method: Method, params: Params, qkv: list[Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    drawn = method.initial(Shape.of(*qkv), params, qkv[0])
    return {name: x + 0.2 * torch.randn(x.shape, generator=g, dtype=x.dtype) for name, x in drawn.items()}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def cut(sides: tuple[int, int], tile: tuple[int, int]) -> dict[tuple[int, int], list[int]]:
    """Place of each region -> its tokens."""
    found: dict[tuple[int, int], list[int]] = {}
    for t in range(sides[0] * sides[1]):
        found.setdefault((t // sides[1] // tile[0], t % sides[1] // tile[1]), []).append(t)
    return found
