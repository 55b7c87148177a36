"""Values between the tokens of a grid, by bilinear interpolation; beyond the grid they are zero.

Positions are in tokens: the token in row i and column j lies at (i, j). So positions that are whole numbers are exact in any precision,
and with them the side from which their gradient, that of the piece to the right of and below them, is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.eager import wide

from ._chunks import rows_per_chunk, zeros_wide

if TYPE_CHECKING:
    from collections.abc import Iterator

Sides = tuple[int, int]


def corners(y: Tensor, x: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """The four tokens around each position and their weights, `[.., 4]` each; a token beyond the grid has weight 0 and index 0."""
    top, left = y.floor().detach(), x.floor().detach()
    down, right = y - top, x - left
    rows, columns = torch.stack([top, top, top + 1, top + 1], -1), torch.stack([left, left + 1, left, left + 1], -1)
    weights = torch.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    inside = (rows >= 0) & (rows < sides[0]) & (columns >= 0) & (columns < sides[1])
    rows, columns, weights = (x.masked_fill(~inside, 0) for x in (rows, columns, weights))
    return rows.long() * sides[1] + columns.long(), weights


def sample(v: Tensor, y: Tensor, x: Tensor, sides: Sides) -> Tensor:
    """Values `[B, H, *S, Dv]` of `v: [B, Hkv, N, Dv]` at positions `[B, H, *S]`, in at least float32."""
    index, weights = corners(y, x, sides)
    batch, head = (torch.arange(n, device=v.device) for n in index.shape[:2])
    trailing = [1] * (index.ndim - 2)
    head = head.view(1, -1, *trailing) // (index.shape[1] // v.shape[1])
    return (weights.unsqueeze(-1) * wide(v)[batch.view(-1, 1, *trailing), head, index]).sum(-2)


def mix(v: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`sum_u weights[.., u] v[index[.., u]]`: `v: [B, Hkv, N, Dv]`, index and weights `[B, H, R, U]` -> `[B, H, R, Dv]` in the dtype of v.

    Sums are in at least float32. Memory beside the inputs: a chunk, and in the backward pass a gradient of v in at least float32.
    """
    out: Tensor = _Mix.apply(v, index, weights)  # type: ignore[no-untyped-call]
    return out


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        v = v.contiguous()
        ctx.save_for_backward(v, index, weights)
        out = v.new_empty(*index.shape[:3], v.shape[3])
        for rows in _chunks(v, index):
            out[:, :, rows] = (weights[:, :, rows].unsqueeze(-2) @ wide(_rows(v, index[:, :, rows])))[..., 0, :].to(v.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        v, index, weights = ctx.saved_tensors
        dv, dweights = zeros_wide(v) if ctx.needs_input_grad[0] else None, torch.empty_like(weights)
        for rows in _chunks(v, index):
            part = wide(grad[:, :, rows]).unsqueeze(-1)
            dweights[:, :, rows] = (wide(_rows(v, index[:, :, rows])) @ part)[..., 0]
            if dv is not None:
                spread = weights[:, :, rows].unsqueeze(-1) * part.transpose(-1, -2)
                dv.flatten(0, 2).index_add_(0, _places(v, index[:, :, rows]), spread.flatten(0, 3))
        return None if dv is None else dv.to(v.dtype), None, dweights


def _chunks(v: Tensor, index: Tensor) -> Iterator[slice]:
    step = rows_per_chunk(v, 3 * index[:, :, 0].numel() * v.shape[3] * wide(v[..., :0]).element_size())
    for start in range(0, index.shape[2], step):
        yield slice(start, min(start + step, index.shape[2]))


def _places(v: Tensor, index: Tensor) -> Tensor:
    """Rows of `v` flattened to `[B Hkv N, Dv]` that `index: [B, H, R, U]` means."""
    b, h = index.shape[:2]
    head = torch.arange(b * h, device=v.device).view(b, h, 1, 1) // (h // v.shape[1])
    return (head * v.shape[2] + index).flatten()


def _rows(v: Tensor, index: Tensor) -> Tensor:
    """`[B, H, R, U, Dv]`."""
    return v.flatten(0, 2).index_select(0, _places(v, index)).view(*index.shape, v.shape[3])
