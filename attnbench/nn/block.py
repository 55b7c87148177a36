"""The pre-norm block of a transformer: mixing between tokens, then an MLP on each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .attention import AttentionLayer

if TYPE_CHECKING:
    from torch import Tensor


class Block(nn.Module):
    """`x += attention(LN(x))`, `x += W2 GELU(W1 LN(x))`, on `[B, N, C]`.

    Args:
        dim: channels C.
        num_heads: heads H.
        method: name in the registry, or `name@implementation`.
        mlp_ratio: hidden units of the MLP over C.
        **layer: the other arguments of `AttentionLayer`, parameters of the method among them.
    """

    def __init__(self, dim: int, num_heads: int, method: str = "softmax", *, mlp_ratio: int = 4, **layer: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = AttentionLayer(dim, num_heads, method, **layer)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
