"""Dashed paths that grow on a canvas, in many images at once, and keep apart from each other.

Lengths are counted in moves of a king: a step goes one row or one column, whichever is more. Pixels are places in one flat array that
holds all images, and what lies between pixels is counted in whole numbers: the same paths on every machine, in few passes over few bytes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

GAP, APART = 1, 2
"""blank pixels between dashes of a path, and between paths, at least"""
BORDER = 16
"""pixels around the image that are never drawn on: none that is asked for lies farther out"""
_PIXEL = 1 << 16
"""the side of a pixel, as places between pixels are counted"""
_CIRCLE = 1 << 12
"""headings there are"""
_TRIED, _TURN = 12, round(_CIRCLE / (2 * np.pi))
"""headings tried for a dash, and the largest turn: one radian"""
_AHEAD = 9
"""pixels that a heading looks ahead: the first that sees most of them free is taken"""
POINT = 0.0
"""the radius of a dot that is one pixel"""


class Canvas:
    """Which pixels are drawn and which are too near to them, `[C, W, W]`, W = S + borders; borders count as near."""

    def __init__(self, count: int, side: int) -> None:
        self.side, self.width = side, side + 2 * BORDER
        self.ink = np.zeros((count, self.width, self.width), bool)
        self.near = np.ones_like(self.ink)
        self.near[:, BORDER:-BORDER, BORDER:-BORDER] = False

    def keep(self, where: np.ndarray) -> None:
        """Keep only the images `where: [C]`, a mask or numbers."""
        self.ink, self.near = self.ink[where], self.near[where]

    @property
    def first(self) -> np.ndarray:
        """The flat place of the first pixel of each image `[C, 1]`; without it, a place is one of the first image."""
        return np.arange(len(self.ink))[:, None] * self.width**2

    def around(self, pixels: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """Flat places `[.., R]` at offsets `reach: [R, 2]` of rows and columns from flat places `pixels: [..]`."""
        grown: np.ndarray = pixels[..., None] + (reach[:, 0] * self.width + reach[:, 1])
        return grown

    def stamp(self, target: np.ndarray, pixels: np.ndarray, reach: np.ndarray) -> None:
        """Set `target: [C, W, W]` at flat places of any shape, grown by offsets `reach: [R, 2]`."""
        target.reshape(-1)[self.around(pixels, reach)] = True


def draw(canvas: Canvas, pixels: np.ndarray, where: np.ndarray, dot: float) -> None:
    """Draw paths `[C, P]` in the images `where: [C]`; keep others away from them and from the dots that their tips may get."""
    places = (pixels + canvas.first)[where]
    canvas.stamp(canvas.ink, places, disc(POINT))
    canvas.stamp(canvas.near, places, _square(APART))
    canvas.stamp(canvas.near, places[:, [0, -1]], _guard(dot))


def grow(rng: np.random.Generator, canvas: Canvas, dashes: int, dash: int, dot: float) -> tuple[np.ndarray, np.ndarray]:
    """One path an image: pixels `[C, dashes x dash]` in order, as places of the first image, and whether it came off `[C]`."""
    near, live = canvas.near.copy(), np.arange(len(canvas.ink))
    drawn = np.zeros((len(live), dashes, dash), np.int64)
    ends, taken = np.zeros((2, len(live)), np.int32), np.zeros(len(live), np.int32)
    for number in range(dashes):
        starts, headings, ways = _onwards(rng, ends, taken) if number else _anywhere(rng, len(live), canvas.side)
        ahead = _ahead(starts, ways, dash + _AHEAD, canvas.width) + canvas.first[live]
        room = _room(near, ahead, dash)
        if number in (0, dashes - 1):
            tips = ahead[0 if number == 0 else dash - 1]
            room[near.take(canvas.around(tips, disc(dot))).any(-1)] = 0
        chosen = room.argmax(1)
        row = np.flatnonzero(room.max(1))
        chosen, live = chosen[row], live[row]
        drawn[live, number] = ahead[:dash, row, chosen].T
        if number:
            canvas.stamp(near, drawn[live, number - 1], _square(APART))
        if number == 1:
            canvas.stamp(near, drawn[live, 0, 0], _guard(dot))
        ends, taken = starts[:, row, chosen] + (dash - 1) * ways[:, row, chosen], headings[row, chosen]
    done = np.zeros(len(drawn), bool)
    done[live] = True
    return drawn.reshape(len(drawn), dashes * dash) - canvas.first, done


def _room(near: np.ndarray, ahead: np.ndarray, dash: int) -> np.ndarray:
    """How many pixels of `ahead: [length, C, T]` come before the first that is near to something; 0 where a dash does not fit."""
    free = ~near.take(ahead)
    for i in range(1, len(free)):
        free[i] &= free[i - 1]
    room: np.ndarray = free.sum(0, dtype=np.uint8) * free[dash - 1]
    return room


def _anywhere(rng: np.random.Generator, count: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts `[2, C, T]`, headings `[C, T]` and steps `[2, C, T]` of a first dash."""
    starts = rng.integers(BORDER * _PIXEL, (BORDER + side) * _PIXEL, (2, count, _TRIED), np.int32)
    headings = rng.integers(0, _CIRCLE, (count, _TRIED), np.int32)
    return starts, headings, _king().take(headings, 1)


def _onwards(rng: np.random.Generator, ends: np.ndarray, headings: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of a dash that follows one with `headings: [C]` which ended at `ends: [2, C]`: behind a gap, and turned."""
    turned = (headings[:, None] + rng.integers(-_TURN, _TURN, (len(headings), _TRIED), np.int32, endpoint=True)) & (_CIRCLE - 1)
    ways = _king().take(turned, 1)
    return ends[:, :, None] + (GAP + 1) * ways, turned, ways


def _ahead(starts: np.ndarray, ways: np.ndarray, length: int, width: int) -> np.ndarray:
    """Places `[length, C, T]` of the pixels that lie ahead, in an image by itself."""
    steps = np.arange(length, dtype=np.int32)[:, None, None]
    rows, columns = ((start + steps * way) >> 16 for start, way in zip(starts, ways, strict=True))
    flat: np.ndarray = rows * np.int32(width) + columns
    return flat


@cache
def _king() -> np.ndarray:
    """The step `[2, headings]` of one row or one column, whichever is more, in each direction."""
    angles = np.arange(_CIRCLE) * (2 * np.pi / _CIRCLE)
    way = np.stack([np.sin(angles), np.cos(angles)])
    step: np.ndarray = np.rint(_PIXEL * way / np.abs(way).max(0)).astype(np.int32)
    return step


@cache
def _square(reach: int) -> np.ndarray:
    """Offsets `[R, 2]` of all pixels within `reach` moves of a king."""
    return np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)


@cache
def disc(radius: float) -> np.ndarray:
    """Offsets `[P, 2]` within a radius."""
    offsets = _square(int(radius))
    disc: np.ndarray = offsets[(offsets**2).sum(1) <= radius**2]
    return disc


@cache
def _guard(radius: float) -> np.ndarray:
    """Offsets `[R, 2]` that are too near to a dot."""
    return np.unique((disc(radius)[:, None] + _square(APART)).reshape(-1, 2), axis=0)
