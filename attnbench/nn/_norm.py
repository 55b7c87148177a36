"""Normalisation of the queries and keys of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import rms_norm

if TYPE_CHECKING:
    from torch import Tensor


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels of a head, `[..., D]`, in the dtype of its input: under autocast the weight is cast, as a Linear's is."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`."""
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
