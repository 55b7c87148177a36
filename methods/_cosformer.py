"""The practical implementation of cosFormer: features rounded once, and their derivative, in few passes."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from ._kernel import Kernel, Part
from ._kernelised_causal import Features, causal
from ._kernelised_chunked import bidirectional
from .cosformer import NORM, CosformerParams, angles, feature

if TYPE_CHECKING:
    from torch import Tensor


def chunked(q: Tensor, k: Tensor, v: Tensor, params: CosformerParams) -> Tensor:
    """`q: [B, H, N, D]` -> `[B, H, N, Dv]`. Memory beside inputs and output: features of some heads, 2 D elements a token."""
    if params.causal:
        phi = partial(feature, length=q.shape[2])
        return causal(q, k, v, Features.plain(2 * q.shape[3], phi, phi), NORM)
    return bidirectional(q, k, v, Cosine(q, k))


class Cosine(Kernel):
    """`phi(x_i) = [relu(x_i) sin, relu(x_i) cos]` of `pi i / 2M`."""

    norm, vanishes = NORM, True

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.width, self.length, self.device = 2 * q.shape[3], max(q.shape[2], k.shape[2]), q.device
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.step = math.pi / (2 * self.length)

    @cached_property
    def turns(self) -> tuple[Tensor, Tensor]:
        """Sine and cosine of every token's angle, `[M, 1]`."""
        angle = angles(torch.arange(self.length, device=self.device), self.length)
        return angle.sin().to(self.dtype), angle.cos().to(self.dtype)

    def features(self, x: Tensor, part: Part) -> Tensor:
        """Products in float32, rounded once."""
        phi, positive = x.new_empty(*x.shape[:-1], self.width), x.clamp(min=0)
        for half, turn in zip(phi.chunk(2, -1), self.turns, strict=True):
            torch.mul(positive, turn[part.tokens], out=half)
        return phi

    def backward(self, grad: Tensor, features: Tensor, x: Tensor, part: Part, out: Tensor) -> tuple[()]:
        """With `e = g phi`, the sum of its halves over x, where x is above 0: of rounded features, so that their differences fit."""
        (sines, cosines), (sin, cos) = grad.chunk(2, -1), features.chunk(2, -1)
        total = (sines * sin).addcmul_(cosines, cos).mul_(part.share)
        positive = x > 0
        torch.mul(total.div_(torch.where(positive, x, 1)), positive, out=out)
        return ()
