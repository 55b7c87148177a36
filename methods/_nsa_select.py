"""What a query of NSA reads beside the compressed keys: the importance of selection blocks, their choice, and the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.eager import attend

if TYPE_CHECKING:
    from .nsa import NsaParams


def importance(p: Tensor, kv_heads: int, blocks: int, params: NsaParams) -> Tensor:
    """`P [B, Hkv, R, blocks]` of selection blocks, from the compressed branch's probabilities `p: [B, H, R, C]`."""
    p = p.unflatten(1, (kv_heads, -1)).sum(2)
    covers, per_block = params.compress // params.stride, params.block // params.stride
    steps = blocks * per_block
    padded = pad(p, (covers - 1, steps - p.shape[-1]))
    strides = sum(padded[..., n : n + steps] for n in range(covers))
    assert isinstance(strides, Tensor)
    summed: Tensor = strides.unflatten(-1, (blocks, per_block)).sum(-1)
    return summed


@torch.no_grad()
def choose(p: Tensor, rows: Tensor, kv_heads: int, keys: int, params: NsaParams) -> Tensor:
    """Selection blocks `[B, Hkv, R, S]` of the queries at positions `rows`, -1 where there is none."""
    blocks = -(-keys // params.block)
    score = importance(p, kv_heads, blocks, params)
    block, own = torch.arange(blocks, device=p.device), rows[:, None] // params.block
    forced = (block < params.first) | ((block <= own) & (block > own - params.local))
    score = score.masked_fill(forced, float("inf"))
    score = score.masked_fill(block > own, float("-inf")) if params.causal else score
    best = score.topk(min(params.topk, blocks), -1)
    return best.indices.masked_fill(best.values == float("-inf"), -1)


def block_tokens(chosen: Tensor, keys: int, params: NsaParams) -> Tensor:
    """Tokens `[..., S block]` of the blocks `chosen: [..., S]`, -1 where there is none."""
    tokens = chosen.unsqueeze(-1) * params.block + torch.arange(params.block, device=chosen.device)
    return tokens.masked_fill((chosen < 0).unsqueeze(-1) | (tokens >= keys), -1).flatten(-2)


def window_tokens(rows: Tensor, keys: int, params: NsaParams) -> Tensor:
    """Tokens `[R, w]` of the windows of the queries at positions `rows`, -1 beyond the ends."""
    before, after = (min(reach, keys - 1) for reach in params.windowed.reach)
    tokens = rows[:, None] + torch.arange(-before, after + 1, device=rows.device)
    return tokens.masked_fill((tokens < 0) | (tokens >= keys), -1)


def read(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Attention of `q: [B, H, R, D]` to `tokens: [B or 1, Hkv or 1, R, U]` where `mask`, of that shape, allows: `[B, H, R, Dv]`."""
    b, h = torch.arange(k.shape[0], device=k.device).view(-1, 1, 1, 1), torch.arange(k.shape[1], device=k.device).view(-1, 1, 1)
    keys, values = (x[b, h, tokens.clamp(min=0)] for x in (k, v))
    queries = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)
    return attend(queries, keys, values, q.shape[-1] ** -0.5, mask.unsqueeze(3)).transpose(2, 3).flatten(1, 2)
