"""Accuracy by slice of a held-out split, such as by the number of pairs to recall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SLICES, _RANGES = 16, 8
"""slices told apart, and ranges that more of them are told by"""


def by_slice(hits: Tensor, slices: Tensor) -> dict[str, float]:
    """Accuracy of each slice, or of ranges of slices."""
    values = slices.unique()
    if len(values) <= _SLICES:
        return {str(g): float(hits[slices == g].mean()) for g in values.tolist()}
    inner = slices.double().quantile(torch.arange(1, _RANGES, dtype=torch.float64) / _RANGES).unique()
    numbers = torch.bucketize(slices.double(), inner)
    parts = [numbers == number for number in numbers.unique().tolist()]
    return {f"{int(slices[part].min())}-{int(slices[part].max())}": float(hits[part].mean()) for part in parts}
