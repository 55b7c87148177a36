"""Pathfinder: do the two dots lie on the same dashed path?

An image holds two long paths of 14 dashes each, both with two tips, and shorter distractors. Two tips carry a dot: both tips of one path
(class 1), or one tip of each (class 0). Pixels are 0 or 1, one token a pixel, row by row.

Difficulty, from the settings of Long Range Arena (14 dashes, the hardest): at 32 x 32 dashes of 2 pixels, dots of radius 1.5 and 5
distractors of 4 dashes; at 64 x 64 dashes of 5 pixels, dots of radius 2.5 and 5 distractors of 4 dashes; one blank pixel between dashes.
Smaller images, for quick looks, hold shorter and fewer paths. `group` is the distance of the dots in pixels.
Linsley et al. 2018, https://arxiv.org/abs/1805.08315; Tay et al. 2021, https://arxiv.org/abs/2011.04006.

Departures: drawn by code of our own, without grey levels. Lengths are counted in moves of a king, so that a dash has exactly so many
pixels, a gap is exactly one, and at least two blank pixels part what is not the same path; the answer then follows from the pixels alone.
Of the two ways to dot one path and the four ways to dot two, those are taken whose dots lie about as far apart as each other, and the
class decides between them: how far the dots lie from each other tells next to nothing.

Paths grow dash by dash, in all images at once: of several turned headings the first that meets nothing is taken. An image in which one
of the two long paths got stuck is dropped for another; a distractor that got stuck is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench.errors import UserError
from attnbench.tasks import _dashes
from attnbench.tasks._draw import balanced, generator
from attnbench.tasks.trained import Batch, TrainedTask, square

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

_SMALLEST = 16


@dataclass(frozen=True)
class Drawing:
    """Sizes in pixels for one side of the image."""

    side: int
    dash: int
    radius: float
    """of the dots"""
    dashes: int = 14
    """in a long path"""
    distractors: int = 5

    @property
    def short(self) -> int:
        """Dashes of a distractor."""
        return self.dashes // 3

    @property
    def dot(self) -> np.ndarray:
        """Offsets `[P, 2]` of the pixels of a dot."""
        return _dashes.disc(self.radius)


def drawing(n: int) -> Drawing:
    """Sizes for N pixels. Raises `UserError` where N is no square or too small for two paths."""
    side, _ = square(n)
    if side < _SMALLEST:
        raise UserError(f"pathfinder needs at least {_SMALLEST} x {_SMALLEST} = {_SMALLEST**2} pixels, not {n}: set n to 1024 or 4096")
    if side < 32:
        return Drawing(side, 2, 1.5, 14 * n // 1024 + 1, 5 * n // 1024)
    return Drawing(side, 2, 1.5) if side < 64 else Drawing(side, 5, 2.5)


def batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Images and whether their dots are connected, as many of each class. Raises `UserError` for N that is no square."""
    sizes, rng = drawing(n), generator("pathfinder", split, index, size, n, seed)
    labels = balanced(rng, size, 2)
    images, distances = np.zeros((0, 2, n), bool), np.zeros(0, np.int64)
    while len(images) < size:
        drawn = _scenes(rng, 2 * size, sizes)
        images, distances = (np.concatenate(pair)[:size] for pair in zip((images, distances), drawn, strict=True))
    chosen = torch.from_numpy(images[np.arange(size), labels].astype(np.int64))
    mask = torch.ones(size, n, dtype=torch.bool)
    return Batch(chosen, torch.from_numpy(labels.astype(np.int64)), mask, torch.from_numpy(distances))


def _scenes(rng: np.random.Generator, count: int, sizes: Drawing) -> tuple[np.ndarray, np.ndarray]:
    """Images `[B, 2, N]`, of class 0 and of class 1, and the distance of the dots in pixels `[B]`, of the scenes that came off."""
    canvas, tips = _dashes.Canvas(count, sizes.side), np.zeros((count, 0, 2, 2), int)
    for _ in range(2):
        pixels, ok = _dashes.grow(rng, canvas, sizes.dashes, sizes.dash, sizes.dot)
        canvas.keep(ok)
        tips = np.concatenate([tips, pixels[:, None, [0, -1]]], 1)[ok]
        _dashes.draw(canvas, pixels[ok], np.ones(len(tips), bool), sizes.dot)
    for _ in range(sizes.distractors):
        pixels, ok = _dashes.grow(rng, canvas, sizes.short, sizes.dash, _dashes.POINT)
        _dashes.draw(canvas, pixels, ok, _dashes.POINT)
    dots, distances = _dots(tips)
    images = np.stack([canvas.ink, canvas.ink], 1)
    for kind, dot in product(range(2), range(2)):
        at = dots[:, kind, dot, None] + sizes.dot + _dashes.BORDER
        images[np.arange(len(images))[:, None], kind, at[..., 0], at[..., 1]] = True
    inner = slice(_dashes.BORDER, -_dashes.BORDER)
    return images[:, :, inner, inner].reshape(len(images), 2, sizes.side**2), distances


def _dots(tips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places `[B, class, dot, 2]` of two dots for either class, from `tips: [B, path, tip, 2]`, and their mean distance `[B]`."""
    same = np.stack([tips[:, path] for path in range(2)], 1)
    other = np.stack([np.stack([tips[:, 0, a], tips[:, 1, b]], 1) for a, b in product(range(2), range(2))], 1)
    apart = [np.linalg.norm(pair[:, :, 0] - pair[:, :, 1], axis=-1) for pair in (same, other)]
    best = np.abs(apart[0][:, :, None] - apart[1][:, None]).reshape(len(tips), 8).argmin(1)
    row, of_same, of_other = np.arange(len(tips)), best // 4, best % 4
    mean = (apart[0][row, of_same] + apart[1][row, of_other]) / 2
    return np.stack([other[row, of_other], same[row, of_same]], 1), mean.round().astype(np.int64)


TASK = TrainedTask(
    name="pathfinder",
    title="Pathfinder",
    kind="pixels",
    vocabulary=2,
    classes=2,
    causal=False,
    grid=square,
    chance=0.5,
    lengths=(1024, 4096),
    source="Linsley et al. 2018, https://arxiv.org/abs/1805.08315, as in Tay et al. 2021, https://arxiv.org/abs/2011.04006; other code",
    batch=batch,
    group="distance",
)
