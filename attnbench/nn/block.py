"""The pre-norm block of a transformer: mixing between tokens, then an MLP on each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnbench.errors import UserError

from .attention import AttentionLayer

if TYPE_CHECKING:
    from torch import Tensor


class Block(nn.Module):
    """`x += attention(LN(x))`, `x += W2 GELU(W1 LN(x))`, on `[B, N, C]`.

    >>> import torch
    >>> from attnbench.nn import Block
    >>> block = Block(64, num_heads=4, method="mita", prefix=1, grid=(6, 8), landmarks=4, topk=8)
    >>> x = torch.randn(2, 1 + 6 * 8, 64)
    >>> block(x).shape
    torch.Size([2, 49, 64])
    >>> plain = Block(64, num_heads=4)  # softmax: the same weights fit
    >>> plain.load_state_dict(block.state_dict())
    <All keys matched successfully>
    >>> deep = torch.nn.Sequential(*(Block(64, 4, "agent", landmarks=9, drop_path=0.1) for _ in range(3)))
    >>> deep(x).shape
    torch.Size([2, 49, 64])

    Args:
        dim: channels C.
        num_heads: heads H.
        method: name in the registry, or `name@implementation`.
        mlp_ratio: hidden units of the MLP over C.
        drop_path: how often each of the two additions is left out for an example in training.
        **layer: the other arguments of `AttentionLayer`, parameters of the method among them.
    """

    def __init__(
        self, dim: int, num_heads: int, method: str = "softmax", *, mlp_ratio: int = 4, drop_path: float = 0.0, **layer: Any
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = AttentionLayer(dim, num_heads, method, **layer)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return self._fed(x)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        """All that comes before the operator: q, k, v and, where there is one, the gate."""
        return self.attention.projected(self.norm1(x))

    def after(self, x: Tensor, mixed: Tensor, v: Tensor, *gate: Tensor) -> Tensor:
        """All that comes after it: the tokens as they came and what the operator made of them, to those of the next block."""
        return self._fed(x + self.drop_path(self.attention.output(mixed, v, *gate)))

    def _fed(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class DropPath(nn.Module):
    """Stochastic depth: in training the whole of an example is zero with the given chance, else divided by what is left of it.

    Huang et al. 2016, https://arxiv.org/abs/1603.09382, for each example as timm and DeiT have it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise UserError(f"drop_path = {rate} must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` -> `[B, ...]`; draws nothing where the chance is 0."""
        if not (self.training and self.rate):
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)
