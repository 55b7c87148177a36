"""The offset network of the deformable attention transformer, and the points of the grid that it leads to.

Channels of a group of heads go through a depthwise convolution with a stride, a layer norm over them, GELU, and a linear map to two numbers
a point: how far it lies from its reference, in the coordinates -1 to 1 of the grid's height and width. All groups share the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad

from attnbench.eager import wide

if TYPE_CHECKING:
    from collections.abc import Mapping

Sides = tuple[int, int]
Release = Literal["2023", "2022"]
"""of the authors' repository"""


def padding(kernel: int, stride: int) -> int:
    """Zeros around the grid; none where patches do not overlap, as in the authors' code."""
    return 0 if kernel == stride else kernel // 2


def points_of(sides: Sides, kernel: int, stride: int) -> Sides:
    """Points along the height and the width; less than 1 where the kernel does not fit."""
    height, width = ((side + 2 * padding(kernel, stride) - kernel) // stride + 1 for side in sides)
    return height, width


def convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Tokens `x: [.., h, w, D]` convolved channel by channel with `weight: [.., D, S, S]` -> `[.., rows, columns, D]`.

    As a sum over patches that are views: a large kernel with as large a stride then costs a pass over x, forward and backward.
    """
    size = weight.shape[-1]
    margin = padding(size, stride)
    patches: Tensor = pad(x, (0, 0, margin, margin, margin, margin)).unfold(-3, size, stride).unfold(-3, size, stride)
    return (patches * weight.unsqueeze(-4).unsqueeze(-4)).sum((-2, -1))


def offsets(q: Tensor, sides: Sides, stride: int, own: Mapping[str, Tensor]) -> Tensor:
    """`[B, G, rows, columns, 2]` of queries `[B, H, N, D]`, height first."""
    weight, bias = wide(own["conv_weight"]), wide(own["conv_bias"])
    group = len(weight)
    tokens = wide(q).unflatten(2, sides).unflatten(1, (-1, group))
    mapped = (convolve(tokens, weight, stride) + bias[:, None, None]).movedim(2, -2).flatten(-2)
    normed = layer_norm(mapped, mapped.shape[-1:], wide(own["norm_weight"]), wide(own["norm_bias"]))
    return gelu(normed) @ wide(own["offset_weight"]).T


def references(points: int, release: Release, like: Tensor) -> Tensor:
    """`[points]` coordinates of the references along one side; the authors' first code had cell centres, their current one divides by
    `points - 1`, so that the last lies beyond 1. A single reference lies in the middle."""
    if points == 1:
        return torch.zeros(1, dtype=like.dtype, device=like.device)
    cells = torch.arange(points, dtype=like.dtype, device=like.device) + 0.5
    return 2 * cells / (points if release == "2022" else points - 1) - 1


def coordinates(found: Tensor, reach: float, release: Release) -> Tensor:
    """Positions `[B, G, rows, columns, 2]` of points with offsets `found`, in coordinates; `reach` is the authors' offset range factor."""
    counts = found.shape[2:4]
    rows, columns = (references(n, release, found) for n in counts)
    reference = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    if reach < 0:
        return (found + reference).tanh() if release == "2022" else (found + reference).clamp(-1, 1)
    if reach == 0 and release == "2022":
        return found + reference
    steps = [reach / n if release == "2022" else reach / max(1, n - 1) for n in counts]
    return torch.stack([x.tanh() * step for x, step in zip(found.unbind(-1), steps, strict=True)], -1) + reference
