"""Attention masks of other libraries, read for what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def is_causal_mask(mask: Tensor, queries: int, keys: int, owner: str) -> bool:
    """True for the lower triangle of a square mask `[B, H, N, M]`, False where it hides nothing; boolean (True is visible) or additive.

    B, H and N may be 1, for all of them. Raises `UserError` for every other mask: no method could honour padding, packing, windows or
    biases.
    """
    visible = mask if mask.dtype == torch.bool else _visible(mask, owner)
    if visible.ndim == 4 and (visible.shape[-2:] == (queries, keys) or visible.shape[-2:] == (1, keys)):
        if bool(visible.all()):
            return False
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        if queries == keys and bool((visible == triangle).all()):
            return True
    raise UserError(
        f"{owner} cannot honour this attention mask (padding, packing, a window or a cache): give sequences of one length and no mask"
    )


def _visible(mask: Tensor, owner: str) -> Tensor:
    """An additive mask as a boolean one."""
    visible, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min / 2
    if not bool((visible | hidden).all()):
        raise UserError(f"{owner} cannot add a bias to attention scores: use attn_implementation='eager' for this model")
    return visible
