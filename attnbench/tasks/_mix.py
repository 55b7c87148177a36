"""Pairs of training images mixed into one, and their classes with them, as in DeiT.

One of two for a whole batch, each half of the time, and image i with image j = B - 1 - i: mixup `x_i <- l x_i + (1 - l) x_j` with l of
Beta(0.8, 0.8), or cutmix, which pastes a box of x_j of the share 1 - l of the area, l uniform; where the box runs over the edge, l is the
share that is left. Classes are `l y_i + (1 - l) y_j`, each smoothed before: `1 - s + s / C` for its own, `s / C` for others, s = 0.1.

Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019, https://arxiv.org/abs/1905.04899; Szegedy et al. 2016,
https://arxiv.org/abs/1512.00567; with the settings of Touvron et al. 2021, https://arxiv.org/abs/2012.12877.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SMOOTHING = 0.1
_MIXUP, _CUTMIX, _SWITCH = 0.8, 1.0, 0.5


def mixed(images: Tensor, labels: Tensor, classes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`[B, 3, S, S]` and `[B]` long -> images of the same shape and shares of the classes `[B, classes]`."""
    targets = smoothed(labels, classes)
    if rng.random() < _SWITCH:
        images, kept = _cut(images, float(rng.beta(_CUTMIX, _CUTMIX)), rng)
    else:
        kept = float(rng.beta(_MIXUP, _MIXUP))
        images = kept * images + (1 - kept) * images.flip(0)
    return images, kept * targets + (1 - kept) * targets.flip(0)


def smoothed(labels: Tensor, classes: int) -> Tensor:
    """Shares of the classes `[B, classes]` of labels `[B]`."""
    off = SMOOTHING / classes
    return torch.full((len(labels), classes), off).scatter_(1, labels[:, None], 1 - SMOOTHING + off)


def _cut(images: Tensor, kept: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """The images with a box of their partner, and the share of the area that is their own."""
    side = images.shape[-1]
    half = int(side * (1 - kept) ** 0.5) // 2
    middle = rng.integers(0, side, 2)
    (top, left), (bottom, right) = (middle - half).clip(0, side), (middle + half).clip(0, side)
    out = images.clone()
    out[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return out, 1 - float((bottom - top) * (right - left)) / side**2
