"""Long token axes in chunks that are computed again in the backward pass, so that no intermediate of all tokens is ever kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_SUMMED = 1024
"""tokens summed by one product: a sum over all N in one product would leave most of a GPU idle"""


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which the backward pass keeps the arguments alone."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def outer_sum(a: Tensor, b: Tensor) -> Tensor:
    """`a^T b`: `[..., N, D]` and `[..., N, F]` -> `[..., D, F]`, as a sum over runs of tokens."""
    n = a.shape[-2]
    runs = next(r for r in range(max(1, n // _SUMMED), 0, -1) if n % r == 0)
    total: Tensor = (a.unflatten(-2, (runs, -1)).transpose(-1, -2) @ b.unflatten(-2, (runs, -1))).sum(-3)
    return total
