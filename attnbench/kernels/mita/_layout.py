"""Where the buffers of a program lie in memory: those whose uses are ordered in time may share it.

A buffer lives from the first launch that takes it to the last. On one stream launches follow each other; those on the second stream
follow what preceded the fork and precede what waits for them, and nothing else. A buffer may also lie in a tensor that the call returns,
where all its uses come before the first of that tensor: the output is written last, and until then holds the landmark pass's partial sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENT = 256
"""bytes; Triton asks for 16"""


class Step(NamedTuple):
    """One launch, as far as time goes."""

    aside: bool
    """whether it is on the second stream"""
    waits: bool
    """whether it, and all that follows on the first stream, comes after what is on the second"""


class Piece(NamedTuple):
    """A buffer to be placed."""

    bytes: int
    uses: frozenset[int]
    """the launches that take it"""


class Layout(NamedTuple):
    """(host, offset in bytes) of every buffer, host -1 being an allocation of `bytes`."""

    places: tuple[tuple[int, int], ...]
    bytes: int


def followers(steps: Sequence[Step]) -> list[frozenset[int]]:
    """The launches that begin after the end of each, whatever the streams do."""
    fork = next((i for i, x in enumerate(steps) if x.aside), len(steps))

    def ordered(i: int, j: int) -> bool:
        if steps[i].aside == steps[j].aside or i < fork:
            return True
        return steps[i].aside and any(x.waits for x in steps[i + 1 : j + 1])

    return [frozenset(j for j in range(i + 1, len(steps)) if ordered(i, j)) for i in range(len(steps))]


def before(a: Piece, b: Piece, after: Sequence[frozenset[int]]) -> bool:
    """Whether every use of `a` ends before any of `b` begins."""
    return all(b.uses <= after[i] for i in a.uses)


def apart(pieces: Sequence[Piece]) -> Layout:
    """Each has memory of its own."""
    places, end = [], 0
    for piece in pieces:
        places.append((-1, end))
        end += aligned(piece.bytes)
    return Layout(tuple(places), end)


def aligned(size: int) -> int:
    """The least multiple of the alignment not below `size`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def shared(pieces: Sequence[Piece], hosts: Sequence[Piece], steps: Sequence[Step]) -> Layout:
    """Large ones first, each in the first gap wide enough among those that live at the same time: of a host, else of the allocation."""
    after = followers(steps)
    places: dict[int, tuple[int, int]] = {}

    def gap(i: int, host: int) -> int:
        taken = sorted(
            (places[j][1], places[j][1] + aligned(pieces[j].bytes))
            for j in places
            if places[j][0] == host and not before(pieces[i], pieces[j], after) and not before(pieces[j], pieces[i], after)
        )
        start = 0
        for first, end in taken:
            if first - start >= pieces[i].bytes:
                break
            start = max(start, end)
        return start

    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].bytes):
        options = [(host, gap(i, host)) for host, x in enumerate(hosts) if before(pieces[i], x, after)]
        fits = [(host, at) for host, at in options if at + pieces[i].bytes <= hosts[host].bytes]
        places[i] = fits[0] if fits else (-1, gap(i, -1))
    ends = [at + aligned(pieces[i].bytes) for i, (host, at) in places.items() if host < 0]
    return Layout(tuple(places[i] for i in range(len(pieces))), max(ends, default=0))
