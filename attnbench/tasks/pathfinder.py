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

The suites put a 3 x 3 convolution in front of the blocks (`short_conv`), the conditional encoding of positions of Chu et al. 2021,
https://arxiv.org/abs/2102.10882: a token is one pixel of a dash and does not know which way the dash goes.

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
_DRAWN_FOR_ONE = 3
"""scenes begun for one that comes off, about"""


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
    parts = [_scenes(rng, size, sizes)]
    while (missing := size - sum(len(part[0]) for part in parts)) > 0:
        parts.append(_scenes(rng, missing, sizes))
    canvas = _dashes.Canvas(0, sizes.side)
    canvas.ink, dots, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    canvas.stamp(canvas.ink, dots[np.arange(size), labels] + canvas.first, _dashes.disc(sizes.radius))
    inner = slice(_dashes.BORDER, -_dashes.BORDER)
    images = torch.from_numpy(canvas.ink[:, inner, inner].reshape(size, n).astype(np.int64))
    mask = torch.ones(size, n, dtype=torch.bool)
    return Batch(images, torch.from_numpy(labels.astype(np.int64)), mask, torch.from_numpy(distances))


def _scenes(rng: np.random.Generator, most: int, sizes: Drawing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `most` scenes that came off: ink `[B, W, W]`, places of the dots `[B, class, dot]` and their distance in pixels `[B]`."""
    canvas = _dashes.Canvas(most * _DRAWN_FOR_ONE, sizes.side)
    tips = np.zeros((len(canvas.ink), 0, 2), np.int64)
    for path in range(2):
        pixels, ok = _dashes.grow(rng, canvas, sizes.dashes, sizes.dash, sizes.radius)
        kept = np.flatnonzero(ok)[: most if path else None]
        canvas.keep(kept)
        tips = np.concatenate([tips[kept], pixels[kept][:, None, [0, -1]]], 1)
        _dashes.draw(canvas, pixels[kept], np.ones(len(kept), bool), sizes.radius)
    for _ in range(sizes.distractors):
        pixels, ok = _dashes.grow(rng, canvas, sizes.short, sizes.dash, _dashes.POINT)
        _dashes.draw(canvas, pixels, ok, _dashes.POINT)
    return canvas.ink, *_dots(tips, canvas.width)


def _dots(tips: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Places `[B, class, dot]` of two dots for either class, from those of `tips: [B, path, tip]`, and their mean distance `[B]`."""
    same = np.stack([tips[:, path] for path in range(2)], 1)
    other = np.stack([np.stack([tips[:, 0, a], tips[:, 1, b]], 1) for a, b in product(range(2), range(2))], 1)
    apart = [np.linalg.norm(np.stack(np.divmod(pair, width)) @ (1, -1), axis=0) for pair in (same, other)]
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
