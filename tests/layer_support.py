"""Sizes, parameters and tokens of the layers that tests build."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbench.method import Method, Shape

N, DIM, HEADS = 64, 16, 2


COMPILER = "aot_eager"
"""traces and differentiates as inductor does, without the minutes of compiling C++"""


def settings(method: Method, n: int = N) -> dict[str, Any]:
    """Parameters that fit so many tokens; those that the layer itself tells the method are left out."""
    values = method.parse({}).fitted(Shape(1, HEADS, n, DIM // HEADS)).as_dict()
    return {name: x for name, x in values.items() if name not in ("causal", "prefix", "grid")}


def tokens(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, n, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def grads(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    named = {"x": x, **dict(module.named_parameters())}
    out = module(x)
    found = torch.autograd.grad(out.square().sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))
