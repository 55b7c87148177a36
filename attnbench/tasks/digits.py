"""Digits: real handwriting, ten classes, one token a pixel.

The 1797 images of 8 x 8 pixels and 17 grey levels that scikit-learn carries (test part of the optical recognition data set: Alpaydin and
Kaynak 1998, https://archive.ics.uci.edu/dataset/80), scaled to sqrt(N) x sqrt(N) by bilinear interpolation, without antialiasing, and to
[-1, 1]. N = 64 is the original. The split never changes: in a random order drawn once, 1197 for training, 300 for validation, 300 for test,
as many of each class as there are, up to one in ten. Training goes through a new random order in every epoch; validation and test go
through theirs once and then over again. `group` is the class.

Departures: none; it is no benchmark of the literature at these sizes, but the smallest real one that needs no download.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import interpolate

from attnbench.errors import UserError
from attnbench.tasks._draw import generator
from attnbench.tasks.trained import Batch, TrainedTask, square

if TYPE_CHECKING:
    from torch import Tensor

    from attnbench.tasks.trained import Split

SIZES: dict[Split, int] = {"train": 1197, "validation": 300, "test": 300}
"""Examples of each split."""
_SPLIT_SEED = 0


def batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Images of `sqrt(N) x sqrt(N)` pixels. Raises `UserError` where N is no square or scikit-learn is not installed."""
    side, _ = square(n)
    images, labels = _load()
    chosen = torch.from_numpy(places(split, index, size, seed))
    pixels = interpolate(images[chosen, None], (side, side), mode="bilinear", align_corners=False)
    mask = torch.ones(size, n, dtype=torch.bool)
    return Batch(pixels.reshape(size, n, 1), labels[chosen], mask, labels[chosen])


def places(split: Split, index: int, size: int, seed: int) -> np.ndarray:
    """Places `[B]` in the data set of the examples of a batch."""
    first = np.cumsum([0, *SIZES.values()])[list(SIZES).index(split)]
    mine, count = _order()[first : first + SIZES[split]], SIZES[split]
    at = index * size + np.arange(size)
    if split != "train":
        return mine[at % count]
    epochs = {epoch: generator("digits", split, seed, int(epoch)).permutation(count) for epoch in np.unique(at // count)}
    return mine[[epochs[number // count][number % count] for number in at]]


def _order() -> np.ndarray:
    """A fixed random order of the data set."""
    return generator("digits", "train", _SPLIT_SEED).permutation(sum(SIZES.values()))


@cache
def _load() -> tuple[Tensor, Tensor]:
    """Images `[1797, 8, 8]` in [-1, 1] and classes `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("task digits needs the package scikit-learn, which carries the images: pip install 'attnbench[tasks]'") from None
    data = load_digits()
    return torch.from_numpy(data.images / 8.0 - 1.0).float(), torch.from_numpy(data.target).long()


TASK = TrainedTask(
    name="digits",
    title="Handwritten digits",
    kind="pixels",
    vocabulary=0,
    features=1,
    classes=10,
    causal=False,
    grid=square,
    chance=0.1,
    lengths=(1024, 4096),
    source="Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80, as in scikit-learn; scaled up, fixed split",
    batch=batch,
    group="class",
    examples=SIZES["train"],
    held_out=SIZES["test"],
)
