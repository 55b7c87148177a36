"""Long token axes in chunks that are computed again in the backward pass, so that no intermediate of all tokens is ever kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which the backward pass keeps the arguments alone."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
