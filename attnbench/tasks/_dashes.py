"""Dashed paths that grow on a canvas, in many images at once, and keep apart from each other.

Lengths are counted in moves of a king: a step goes one row or one column, whichever is more.
"""

from __future__ import annotations

import numpy as np

GAP, APART = 1, 2
"""blank pixels between dashes of a path, and between paths, at least"""
BORDER = 8
"""pixels around the image that are never drawn on"""
_HEADINGS, _TURN = 12, 1.0
"""headings tried for a dash, and the largest turn in radians"""
_AHEAD = 9
"""pixels that a heading looks ahead: the first that sees most of them free is taken"""
POINT = np.zeros((1, 2), int)
"""the offset of a pixel from itself"""


class Canvas:
    """Which pixels are drawn and which are too near to them, `[C, S + borders, S + borders]`; borders count as near."""

    def __init__(self, count: int, side: int) -> None:
        self.side = side
        self.ink = np.zeros((count, side + 2 * BORDER, side + 2 * BORDER), bool)
        self.near = np.ones_like(self.ink)
        self.near[:, BORDER:-BORDER, BORDER:-BORDER] = False

    def free(self, pixels: np.ndarray, near: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """Whether all `pixels: [C, .., P, 2]`, grown by offsets `reach: [R, 2]`, lie where `near` is not: `[C, ..]`."""
        at = pixels[..., None, :] + reach + BORDER
        image = np.arange(len(pixels)).reshape(-1, *[1] * (at.ndim - 2))
        hit: np.ndarray = near[image, at[..., 0].clip(0, self.side + 2 * BORDER - 1), at[..., 1].clip(0, self.side + 2 * BORDER - 1)]
        return np.asarray(~hit.any((-1, -2)))

    def keep(self, where: np.ndarray) -> None:
        """Keep only the images `where: [C]`."""
        self.ink, self.near = self.ink[where], self.near[where]

    def stamp(self, target: np.ndarray, pixels: np.ndarray, reach: np.ndarray, where: np.ndarray) -> None:
        """Set `target` at `pixels: [C, P, 2]`, grown by `reach`, in the images `where: [C]`."""
        at = (pixels[where][:, :, None] + reach + BORDER).clip(0, self.side + 2 * BORDER - 1)
        target[np.flatnonzero(where)[:, None, None], at[..., 0], at[..., 1]] = True


def draw(canvas: Canvas, pixels: np.ndarray, where: np.ndarray, dot: np.ndarray) -> None:
    """Draw paths, and keep others away from them and from the dots that their tips may get."""
    canvas.stamp(canvas.ink, pixels, POINT, where)
    canvas.stamp(canvas.near, pixels, _square(APART), where)
    canvas.stamp(canvas.near, pixels[:, [0, -1]], _sum(dot, _square(APART)), where)


def grow(rng: np.random.Generator, canvas: Canvas, dashes: int, dash: int, dot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One path an image: pixels `[C, dashes x dash, 2]` in order, and whether it came off `[C]`."""
    count = len(canvas.ink)
    near, done = canvas.near.copy(), np.ones(count, bool)
    place, heading = np.zeros((count, 2)), np.zeros(count)
    drawn: list[np.ndarray] = []
    for number in range(dashes):
        tip = number in (0, dashes - 1)
        starts, headings = _proposals(rng, place, heading, canvas.side, first=number == 0)
        ahead = _dash(starts, headings, dash + _AHEAD)
        pixels = ahead[:, :, :dash]
        fits = canvas.free(pixels, near, POINT)
        if tip:
            fits &= canvas.free(pixels[:, :, [0 if number == 0 else -1]], near, dot)
        room = canvas.free(ahead[:, :, :, None], near, POINT).cumprod(2).sum(2)
        chosen = (fits * room).argmax(1)
        done &= fits.any(1)
        row = np.arange(count)
        drawn.append(pixels[row, chosen])
        heading = headings[row, chosen]
        place = starts[row, chosen] + (dash - 1) * _king(heading)
        if number:
            canvas.stamp(near, drawn[-2], _square(APART), done)
            if number == 1:
                canvas.stamp(near, drawn[0][:, :1], _sum(dot, _square(APART)), done)
    return np.concatenate(drawn, 1), done


def _proposals(
    rng: np.random.Generator, place: np.ndarray, heading: np.ndarray, side: int, *, first: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Starts `[C, T, 2]` and headings `[C, T]` of a dash: anywhere for the first, else behind a gap and turned."""
    drawn = rng.random((3, len(place), _HEADINGS))
    if first:
        return np.moveaxis(drawn[:2], 0, -1) * side - 0.5, drawn[2] * 2 * np.pi
    headings = heading[:, None] + (2 * drawn[0] - 1) * _TURN
    return place[:, None] + (GAP + 1) * _king(headings), headings


def _king(heading: np.ndarray) -> np.ndarray:
    """The step `[.., 2]` of one row or one column, whichever is more, in a direction."""
    way = np.stack([np.sin(heading), np.cos(heading)], -1)
    step: np.ndarray = way / np.abs(way).max(-1, keepdims=True)
    return step


def _dash(start: np.ndarray, heading: np.ndarray, length: int) -> np.ndarray:
    """Pixels `[.., length, 2]` of a dash."""
    points = start[..., None, :] + np.arange(length)[:, None] * _king(heading)[..., None, :]
    pixels: np.ndarray = np.floor(points + 0.5).astype(np.int64)
    return pixels


def _square(reach: int) -> np.ndarray:
    """Offsets `[R, 2]` of all pixels within `reach` moves of a king."""
    return np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)


def disc(radius: float) -> np.ndarray:
    """Offsets `[P, 2]` within a radius."""
    offsets = _square(int(radius))
    disc: np.ndarray = offsets[(offsets**2).sum(1) <= radius**2]
    return disc


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Offsets of one set from every offset of another."""
    return np.unique((a[:, None] + b).reshape(-1, 2), axis=0)
