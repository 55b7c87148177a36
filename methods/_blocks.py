"""Runs of keys of one length, a last one shorter, as segments of variable-length attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.eager import expand_heads

from ._varlen import Part, group_by_expert, make_part, offsets

if TYPE_CHECKING:
    from torch import Tensor


def block_lengths(keys: int, block: int, device: torch.device) -> Tensor:
    """Keys in each block `[E]`."""
    starts = torch.arange(0, keys, block, device=device)
    return (keys - starts).clamp(max=block)


def own_part(q: Tensor, k: Tensor, v: Tensor, block: int) -> Part:
    """Every query against its own block, causal: segments in the order of the sequence."""
    k, v = expand_heads(q, k, v)
    counts = block_lengths(k.shape[2], block, k.device).repeat(k.shape[0] * k.shape[1])
    edges, longest = offsets(counts), min(block, k.shape[2])
    return Part(None, k.flatten(0, 2), v.flatten(0, 2), edges, edges, longest, longest, causal=True)


def routed_part(chosen: Tensor, k: Tensor, v: Tensor, block: int) -> Part:
    """Queries against the blocks of `chosen: [B, H, N, S]`, -1 for none; the heads of a group meet in the segments of their key head."""
    b, h, _, slots = chosen.shape
    lengths = block_lengths(k.shape[2], block, k.device)
    segments = k.shape[0] * k.shape[1] * len(lengths)
    head = torch.arange(b * h, device=k.device).view(b, h, 1, 1) // (h // k.shape[1])
    ids = (head * len(lengths) + chosen).masked_fill_(chosen < 0, segments)
    order, counts = group_by_expert(ids.flatten(), segments)
    return make_part(order, counts, k.flatten(0, 2), v.flatten(0, 2), lengths.repeat(k.shape[0] * k.shape[1]), slots=slots)
