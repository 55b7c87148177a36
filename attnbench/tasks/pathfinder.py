"""Pathfinder: do the two dots lie on the same dashed path?

An image holds two long paths of equally many dashes, both with two tips, and shorter distractors. Two tips carry a dot: both tips of one
path (class 1), or one tip of each (class 0). Pixels are 0 or 1, one token a pixel, row by row.

Levels are those of Long Range Arena. Plain `pathfinder` is the hard one, and `pathfinder:hard` another name of it.

| level | dashes of a long path | of a distractor |
| --- | --- | --- |
| easy | 6 | 2 |
| intermediate | 9 | 3 |
| hard | 14 | 4 |

`pathfinder:graded` has as many images with long paths of 3, 4, 5 and 6 dashes, and `group` is then their number: short paths teach a model
what long ones need. How softmax learns at each level stands in the suite `accuracy`.

There are 5 distractors. At 32 x 32 dashes have 2 pixels and dots a radius of 1.5, at 64 x 64 5 pixels and 2.5, and one blank pixel lies
between dashes. Smaller images, for quick looks, hold shorter and fewer paths. `group` is the distance of the dots in pixels.
Linsley et al. 2018, https://arxiv.org/abs/1805.08315; Tay et al. 2021, https://arxiv.org/abs/2011.04006; settings from their generators:
https://github.com/google-research/long-range-arena, `lra_benchmarks/data/pathfinder.py` (easy is `curv_baseline`, the others
`curv_contour_length_9` and `_14`), and https://github.com/drewlinsley/pathfinder, `snakes2_wrapper.py` (6 dashes in `curv_baseline`).

Departures: distractors are counted once, for the hard level, since Long Range Arena states their number for that level alone, and the other
generator, which draws 300 x 300 pixels, counts them once too; a distractor has a third of the dashes of a long path, rounded down. All is
drawn by code of our own, without grey levels. Lengths are counted in moves of a king, so that a dash has exactly so many pixels, a gap is
exactly one, and at least two blank pixels part what is not the same path; the answer then follows from the pixels alone. Every image of
class 1 has a partner of class 0 in its batch whose dots lie at the same places, up to 1.5 pixels of 32 and to a turn or a mirror image:
where they lie tells next to nothing. Taken as they come, the two places alone told the class of 0.7 of images of 32 x 32 at the hard level.

What lies around the dots tells more of short paths: a classifier of their distance and of the ink in rings around them, which follows no
path, knows 0.68 of `pathfinder:graded` at 32 x 32, from 0.84 at three dashes to 0.55 at six (`tests/test_task_pathfinder.py -k rings -s`).
At three dashes the tolerance lets a few dots of class 0 lie farther apart than one path reaches, in 3 of 100 such images.

The suites put a 3 x 3 convolution in front of the blocks (`short_conv`), the conditional encoding of positions of Chu et al. 2021,
https://arxiv.org/abs/2102.10882: a token is one pixel of a dash and does not know which way the dash goes.

Paths grow dash by dash, in all images at once: of several turned headings the first that meets nothing is taken. An image in which one
of the two long paths got stuck is dropped for another; a distractor that got stuck is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench.errors import UserError
from attnbench.tasks import _dashes
from attnbench.tasks._draw import generator
from attnbench.tasks.trained import Batch, TrainedTask, square

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

HARD = 14
"""dashes in a long path of the plain task"""
_SMALLEST = 16
_DISTRACTORS = 5
_FEWEST = 3
"""dashes in a long path: the dots of a shorter one are nearer to each other than those of two paths ever are"""
GRADES = (3, 4, 5, 6)
"""dashes in the long paths of `pathfinder:graded`"""
_TOLERANCE = 1.5
"""by how many 32nds of the side the dots of partners may differ in place"""


@dataclass(frozen=True)
class Drawing:
    """Sizes in pixels for one side of the image."""

    side: int
    dash: int
    radius: float
    """of the dots"""
    dashes: int
    """in a long path"""
    distractors: int
    begun: int
    """scenes begun for one that comes off and finds a partner, about"""

    @property
    def short(self) -> int:
        """Dashes of a distractor."""
        return max(1, self.dashes // 3)


def drawing(n: int, dashes: int = HARD) -> Drawing:
    """Sizes for N pixels, and for paths of `dashes` from 32 x 32 on. Raises `UserError` where N is no square or too small for two paths."""
    side, _ = square(n)
    if side < _SMALLEST:
        raise UserError(f"pathfinder needs at least {_SMALLEST} x {_SMALLEST} = {_SMALLEST**2} pixels, not {n}: set n to 1024 or 4096")
    begun = 6 if dashes == HARD else 4
    dash, radius = (2, 1.5) if side < 64 else (5, 2.5)
    if side < 32:
        return Drawing(side, dash, radius, max(_FEWEST, dashes * n // 1024 + 1), _DISTRACTORS * n // 1024, begun)
    return Drawing(side, dash, radius, dashes, _DISTRACTORS, begun)


def batch(split: Split, index: int, size: int, n: int, seed: int, *, dashes: int = HARD) -> Batch:
    """Images and whether their dots are connected, as many of each class. Raises `UserError` for N that is no square."""
    sizes = drawing(n, dashes)
    rng = generator("pathfinder" if dashes == HARD else f"pathfinder of {dashes}", split, index, size, n, seed)
    even = size + size % 2
    parts = [_scenes(rng, even, sizes)]
    while (missing := even - sum(len(part[0]) for part in parts)) > 0:
        parts.append(_scenes(rng, missing, sizes))
    order = rng.permutation(even)[:size]
    canvas = _dashes.Canvas(0, sizes.side)
    canvas.ink, dots, labels = (np.concatenate(part)[order] for part in zip(*parts, strict=True))
    canvas.stamp(canvas.ink, dots + canvas.first, _dashes.disc(sizes.radius))
    inner = slice(_dashes.BORDER, -_dashes.BORDER)
    images = torch.from_numpy(canvas.ink[:, inner, inner].reshape(size, n).astype(np.int64))
    places = np.stack(np.divmod(dots, canvas.width))
    distances = np.linalg.norm(places[..., 0] - places[..., 1], axis=0).round().astype(np.int64)
    return Batch(images, torch.from_numpy(labels), torch.ones(size, n, dtype=torch.bool), torch.from_numpy(distances))


def _scenes(rng: np.random.Generator, most: int, sizes: Drawing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `most` scenes of either class in turn: ink `[B, W, W]`, places of the dots `[B, 2]` and classes `[B]`."""
    canvas = _dashes.Canvas((most + 16) * sizes.begun, sizes.side)
    tips = np.zeros((len(canvas.ink), 0, 2), np.int64)
    for _ in range(2):
        pixels, ok = _dashes.grow(rng, canvas, sizes.dashes, sizes.dash, sizes.radius)
        canvas.keep(ok)
        tips = np.concatenate([tips[ok], pixels[ok][:, None, [0, -1]]], 1)
        _dashes.draw(canvas, pixels[ok], np.ones(len(tips), bool), sizes.radius)
    scenes, dots = _partners(tips, canvas, most)
    canvas.keep(scenes)
    for _ in range(sizes.distractors):
        pixels, ok = _dashes.grow(rng, canvas, sizes.short, sizes.dash, _dashes.POINT)
        _dashes.draw(canvas, pixels, ok, _dashes.POINT)
    return canvas.ink, dots, 1 - np.arange(len(scenes)) % 2


def _partners(tips: np.ndarray, canvas: _dashes.Canvas, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` scenes of `tips: [C, path, tip]` and the places of their dots `[B, 2]`: class 1 and then its partner of class 0."""
    same = tips.reshape(-1, 2)
    other = np.stack([np.stack([tips[:, 0, a], tips[:, 1, b]], 1) for a, b in product(range(2), range(2))], 1).reshape(-1, 2)
    one, two = _turned(same, canvas.width), _turned(other, canvas.width)
    apart = np.square(one).sum(1)[:, None] + np.square(two).sum(1) - 2 * one @ two.T
    near = np.flatnonzero(apart <= (_TOLERANCE * canvas.side / 32) ** 2)
    used = np.zeros(len(tips), bool)
    scenes: list[int] = []
    dots: list[np.ndarray] = []
    for i, j in zip(*np.divmod(near[apart.reshape(-1)[near].argsort(kind="stable")], len(other)), strict=True):
        if len(scenes) < most and i // 2 != j // 4 and not (used[i // 2] or used[j // 4]):
            used[[i // 2, j // 4]] = True
            scenes += [i // 2, j // 4]
            dots += [same[i], other[j]]
    return np.array(scenes[:most], int), np.array(dots[:most], int).reshape(-1, 2)


def _turned(dots: np.ndarray, width: int) -> np.ndarray:
    """Where two dots `[X, 2]` lie, as `[X, 4]`: turned and mirrored so that the outer one, first, lies in one eighth of the image."""
    places = np.stack(np.divmod(dots, width), -1) - (width - 1) / 2
    row = np.arange(len(dots))
    places = places[row[:, None], np.square(places).sum(-1).argsort(1, kind="stable")[:, ::-1]]
    places = places * np.where(places[:, :1] < 0, -1, 1)
    swapped = places[:, 0, 0] < places[:, 0, 1]
    places[swapped] = places[swapped][..., ::-1]
    flat: np.ndarray = places.reshape(-1, 4)
    return flat


def graded_batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Images with each of `GRADES`, about as many of each; batches of fewer images take turns."""
    grades = GRADES if size >= len(GRADES) else tuple(GRADES[(index * size + i) % len(GRADES)] for i in range(size))
    edges = [size * i // len(grades) for i in range(len(grades) + 1)]
    parts = []
    for dashes, begin, end in zip(grades, edges, edges[1:], strict=False):
        part = batch(split, index, end - begin, n, seed, dashes=dashes)
        parts.append(replace(part, groups=torch.full_like(part.groups, drawing(n, dashes).dashes)))
    order = torch.from_numpy(generator("order of graded pathfinder", split, index, size, n, seed).permutation(size))
    return Batch(*(torch.cat([getattr(part, f.name) for part in parts])[order] for f in fields(Batch)))


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

LEVELS = {
    **{
        level: replace(TASK, name=f"pathfinder:{level}", title=f"Pathfinder, {level}", batch=partial(batch, dashes=dashes))
        for level, dashes in (("easy", 6), ("intermediate", 9))
    },
    "graded": replace(TASK, name="pathfinder:graded", title="Pathfinder, graded", batch=graded_batch, group="dashes"),
    "hard": TASK,
}
