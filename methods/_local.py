"""What FLatten and PolaFormer add to their attention: a learned vector for each key, and a convolution of v over the grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnbench.method import param

from ._depthwise import depthwise
from ._grid import GridParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attnbench.method import Shape, Weights


@dataclass(frozen=True, kw_only=True)
class LocalParams(GridParams):
    """Both are off unless asked for."""

    position: bool = param(False, "add a learned vector to the key of each token, 0 at first")
    conv: int = param(0, "side of a depthwise convolution of v over the grid that is added, 5 in the authors' models; 0 adds none", low=0)

    def problems(self, shape: Shape) -> list[str]:
        """Adds a convolution without a centre, of keys that are not the queries' tokens, or of later ones."""
        found = super().problems(shape)
        if self.conv and self.conv % 2 == 0:
            found.append(f"conv = {self.conv} is even: give an odd side, or 0")
        if self.conv and shape.keys != shape.n:
            found.append(f"conv needs as many keys as queries, not {shape.keys} for {shape.n}: set conv = 0")
        if self.conv and self.causal:
            found.append("conv reads later tokens: set conv = 0 where causal")
        return found


def draw(shape: Shape, params: LocalParams, generator: torch.Generator) -> Weights:
    """`position [Hkv, M, D]`, zeros; `conv [Dv, S, S]` and `conv_bias [Dv]`, shared by all heads, as torch draws Conv2d: within 1/S."""
    found = {}
    if params.position:
        found["position"] = torch.zeros(shape.kv_heads, shape.keys, shape.dim, dtype=torch.float64)
    if params.conv:
        for name, size in (("conv", (shape.dim_v, params.conv, params.conv)), ("conv_bias", (shape.dim_v,))):
            found[name] = torch.rand(size, generator=generator, dtype=torch.float64).mul_(2).sub_(1).div_(params.conv)
    return found


def placed(k: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """`k: [B, H, M, D]` with the vectors of its tokens, if there are any."""
    return k + weights["position"] if "position" in weights else k


def convolved(v: Tensor, params: LocalParams, weights: Mapping[str, Tensor]) -> Tensor:
    """The convolution of `v: [B, H, N, Dv]`."""
    kernels = weights["conv"].expand(v.shape[1], -1, -1, -1)
    return depthwise(v, kernels, params.sides(v.shape[2])) + weights["conv_bias"]


def owned(shape: Shape, params: LocalParams) -> int:
    """Elements of the weights."""
    return params.position * shape.kv_heads * shape.keys * shape.dim + bool(params.conv) * shape.dim_v * (params.conv**2 + 1)


def flops(shape: Shape, params: LocalParams) -> int:
    """Of the convolution."""
    return 2 * shape.batch * shape.heads * shape.n * shape.dim_v * params.conv**2
