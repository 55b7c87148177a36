"""MiTA attention as a layer: the drop-in replacement of a vision transformer's self-attention.

Modules of the authors, https://github.com/QishuaiWen/MiTA, and the arguments with which a layer loads their weights with `strict=True`
and computes the same, N = 197 tokens of which the first is the class token:

| their module                                  | `MiTAAttention(dim, num_heads, ...)`                                      |
|-----------------------------------------------|---------------------------------------------------------------------------|
| `mita_attention`, `pool_size=p`, `kv_topk=t`  | `landmarks=p**2, topk=t**2`; theirs squares `kv_topk`, ours counts tokens |
| `_mita_attention`, two experts a query        | `experts_per_query=2, topk=t**2 // 2`                                     |
| `mita_attention_route`                        | `shared=False, topk=50`                                                   |
| `mita_attention_conv`                         | `conv=True`                                                               |
| `mita_attention_conv_gate`                    | `conv=True, gate=True`; theirs stops with a NameError                     |
| ViT-5, without rotation of registers          | `prefix=5, legacy_cls_shift=False, topk=30, qk_norm=True,`                |
|                                               | `positions="rotary-2d"`, with the registers moved behind the class token  |

Departures: their `qk_norm` in `mita_attention` makes layers that nothing uses, ours normalises as ViT-5 does; their `attn_drop` is not
used either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from . import _grid
from .attention import AttentionLayer

if TYPE_CHECKING:
    from ._grid import Grid


class MiTAAttention(AttentionLayer):
    """Self-attention by MiTA, `[B, N, C]` -> `[B, N, C]`; defaults are the authors'.

    Each token reads M landmarks and the K tokens of the S experts nearest to it: see `attnbench show mita`.

    >>> import torch
    >>> from attnbench.nn import MiTAAttention
    >>> x = torch.randn(2, 1 + 12 * 20, 96)
    >>> layer = MiTAAttention(96, num_heads=3, qkv_bias=True, grid=(12, 20), legacy_cls_shift=False, conv=True, gate=True)
    >>> layer(x).shape
    torch.Size([2, 241, 96])
    >>> sorted(layer.state_dict())
    ['dwc.bias', 'dwc.weight', 'proj.bias', 'proj.weight', 'qkvg.bias', 'qkvg.weight']
    >>> route_only = MiTAAttention(96, num_heads=3, shared=False, topk=50)
    >>> compress_only = MiTAAttention(96, num_heads=3, routed=False)

    Args:
        dim: channels C.
        num_heads: heads H.
        landmarks: M, a square number: sqrt(M) x sqrt(M) averages over the grid.
        topk: K, tokens of an expert, at most N. To read as much from more experts, divide it by `experts_per_query`.
        experts_per_query: S. A token in several chosen experts counts once for each.
        shared: read the landmarks; False is route-only.
        routed: read experts; False is compress-only.
        shared_scale: factor of the landmarks' logits.
        prefix: class and register tokens, which come first. 0 where there are none.
        grid: (height, width) of the tokens after them, or `square`; None averages along the sequence.
        legacy_cls_shift: as in the authors' code average the first N - prefix tokens, the class token among them, and leave out the last;
            False averages the patches alone. Needed for their weights, and wrong by one cell otherwise.
        method: `mita`, or `mita@implementation` to pin one.
        **layer: the other arguments of `AttentionLayer`: `qkv_bias`, `proj_bias`, `qk_norm`, `attn_drop`, `proj_drop`, `tokens`,
            `positions`, `theta`, `conv`, `gate`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        landmarks: int = 25,
        topk: int = 25,
        experts_per_query: int = 1,
        shared: bool = True,
        routed: bool = True,
        shared_scale: Literal["1/d", "1/sqrt(d)"] = "1/d",
        prefix: int = 1,
        grid: Grid = "square",
        legacy_cls_shift: bool = True,
        method: str = "mita",
        **layer: Any,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            method,
            landmarks=landmarks,
            topk=topk,
            experts_per_query=experts_per_query,
            shared=shared,
            routed=routed,
            shared_scale=shared_scale,
            prefix=prefix,
            grid=grid,
            legacy_cls_shift=legacy_cls_shift and prefix > 0 and _grid.is_known(_grid.read(grid)),
            **layer,
        )
