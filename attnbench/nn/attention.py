"""Self-attention as a layer, with any method of the registry between its projections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from torch.nn.functional import silu

import attnbench
from attnbench.errors import UserError, unknown

from . import _grid, _operator, _rotary
from ._conv import DepthwiseConvolution
from ._norm import HeadNorm

if TYPE_CHECKING:
    from ._grid import Grid

Positions = Literal["none", "rotary", "rotary-2d"]
_AXES = {"none": 0, "rotary": 1, "rotary-2d": 2}


class AttentionLayer(nn.Module):
    """Self-attention `[B, N, C]` -> `[B, N, C]` by any method, so that only the mixing differs between methods.

    `[q k v g] = x W + b`, `o = method(q, k, v)`, `o += DWC(v)` with `conv`, `o *= SiLU(g)` with `gate`, `y = o W_o + b_o`.

    >>> import torch
    >>> from attnbench.nn import AttentionLayer
    >>> layer = AttentionLayer(64, num_heads=4, method="agent", prefix=1, grid=(6, 8), landmarks=9)
    >>> x = torch.randn(2, 1 + 6 * 8, 64, requires_grad=True)
    >>> layer(x).shape
    torch.Size([2, 49, 64])
    >>> layer(x).sum().backward()
    >>> sorted(layer.state_dict())
    ['proj.bias', 'proj.weight', 'qkv.weight']
    >>> causal = AttentionLayer(64, num_heads=4, positions="rotary", causal=True)
    >>> causal(x).shape
    torch.Size([2, 49, 64])

    The operator gets strided views of the fused projection, never copies, unless `qk_norm` or `positions` make new queries and keys.
    It runs outside autocast, in the dtype that autocast gave the projection.

    Args:
        dim: channels C, a multiple of `num_heads`.
        num_heads: heads H.
        method: name in the registry, or `name@implementation`.
        qkv_bias: whether the fused projection has a bias.
        proj_bias: whether the output projection has a bias.
        qk_norm: RMS-normalise queries and keys over the channels of a head, before positions and before the operator.
        attn_drop: dropout of what the operator returns. Few operators could drop single weights, so every method is dropped alike.
        proj_drop: dropout of the output.
        prefix: class and register tokens before the others: not rotated, not convolved, and told to methods that ask for them.
        grid: (height, width) of the tokens after the prefix, row by row, also as text, or `square`; told to methods that ask for it, as is
            any other word, such as `line`.
        tokens: N, where learned weights of the method depend on it and no grid says it.
        positions: `rotary` along the sequence or `rotary-2d` over the grid; the prefix has none.
        theta: base of the rotary frequencies.
        causal: a token reads only itself and tokens before it.
        conv: add a depthwise 3 x 3 convolution of the values over the grid.
        gate: multiply by SiLU of a fourth projection before the output projection.
        **params: parameters of the method.

    Raises:
        UserError: for arguments that make no sense, in one line that says what to do.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        method: str = "softmax",
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        prefix: int = 0,
        grid: Grid = None,
        tokens: int | None = None,
        positions: Positions = "none",
        theta: float = 10_000.0,
        causal: bool = False,
        conv: bool = False,
        gate: bool = False,
        **params: object,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.method, self.causal = dim, num_heads, attnbench.get(method), causal
        self.prefix, self.grid, self.positions, self.theta = prefix, _grid.read(grid), positions, theta
        self._check(conv)
        self.parts = "qkvg" if gate else "qkv"
        self.add_module(self.parts, nn.Linear(dim, len(self.parts) * dim, qkv_bias))
        head_dim = dim // num_heads
        self.q_norm, self.k_norm = (HeadNorm(head_dim) if qk_norm else None for _ in range(2))
        told = _operator.told(self.method, self.prefix, self.grid, causal=causal)
        self.operator = _operator.build(self.method, num_heads, head_dim, self._length(tokens), told | params)
        self.dwc = DepthwiseConvolution(dim) if conv else None
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(attn_drop), nn.Linear(dim, dim, proj_bias), nn.Dropout(proj_drop)

    def _check(self, conv: bool) -> None:
        if self.positions not in _AXES:
            raise unknown("positions", self.positions, _AXES)
        heads, multiple = self.num_heads, 2 * _AXES[self.positions] or 1
        checks = (
            (heads < 1 or self.dim % heads, f"num_heads = {heads} does not divide dim = {self.dim}: change one of them"),
            (self.prefix < 0, f"prefix = {self.prefix} is below 0: give the number of class and register tokens"),
            (not _grid.is_known(self.grid) and (conv or self.positions == "rotary-2d"),
             "conv and rotary-2d need grid = (height, width) or square"),
            (self.dim // max(heads, 1) % multiple, f"{self.positions} needs a head dimension that is a multiple of {multiple}"),
        )  # fmt: skip
        for fails, reason in checks:
            if fails:
                raise UserError(reason)

    def _length(self, tokens: int | None) -> int | None:
        """N, as given or as the grid says."""
        if isinstance(self.grid, tuple) and tokens is None:
            return self.prefix + self.grid[0] * self.grid[1]
        if _grid.is_known(self.grid) and tokens is not None:
            _grid.sides(self.grid, tokens - self.prefix)
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N, C]`."""
        q, k, v, *gate = self.projected(x)
        return self.output(self.mix(q, k, v), v, *gate)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tokens `[B, N, C]` to q, k, v and with `gate` g, each `[B, H, N, D]`: queries and keys as the operator reads them."""
        fused: Tensor = getattr(self, self.parts)(x)
        q, k, *others = fused.unflatten(-1, (len(self.parts), self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return (*self._placed(q, k, self._sides(x.shape[1])), *others)

    def output(self, mixed: Tensor, v: Tensor, *gate: Tensor) -> Tensor:
        """What the operator returns, `[B, H, N, D]`, to `[B, N, C]`."""
        out = mixed.transpose(1, 2).flatten(2)
        if self.dwc is not None:
            out = out + self.dwc.tokens(v, self._sides(v.shape[2]))
        for g in gate:
            out = out * silu(g.transpose(1, 2).flatten(2))
        y: Tensor = self.proj_drop(self.proj(self.attn_drop(out)))
        return y

    def _sides(self, tokens: int) -> tuple[int, int]:
        count = tokens - self.prefix
        return _grid.sides(self.grid, count) if _grid.is_known(self.grid) else (1, count)

    def _placed(self, q: Tensor, k: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries and keys normalised and rotated, where asked for."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.positions == "none":
            return q, k
        axes = sides if self.positions == "rotary-2d" else (sides[0] * sides[1],)
        turns = _rotary.angles(axes, q.shape[3], self.theta, self.prefix, q.device)
        return _rotary.rotate(q, turns), _rotary.rotate(k, turns)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The operator alone, `[B, H, N, D]`, as wide in values as v."""
        return _operator.mix(self.operator, q, k, v)

    def extra_repr(self) -> str:
        """Sizes, the method and what differs from a plain layer."""
        said = {"prefix": self.prefix, "grid": self.grid, "positions": self.positions, "causal": self.causal}
        more = "".join(f", {name}={x}" for name, x in said.items() if x not in (0, None, "none"))
        return f"{self.dim}, heads={self.num_heads}, method={self.method.label}{more}"
