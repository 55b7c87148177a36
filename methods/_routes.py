"""Choices of experts, where each query has few of them."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8
"""maxima that are taken one after another"""


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last axis and their places, `[..., count]`, best first. Overwrites `scores`.

    By repeated maxima where they are few: on a GPU, torch's topk of many short rows takes several times as long.
    """
    if count > _FEW:
        best = scores.topk(count, -1)
        return best.values, best.indices
    values: list[Tensor] = []
    places: list[Tensor] = []
    for slot in range(count):
        value, place = scores.max(-1, keepdim=True)
        values, places = [*values, value], [*places, place]
        if slot < count - 1:
            scores.scatter_(-1, place, float("-inf"))
    return torch.cat(values, -1), torch.cat(places, -1)
