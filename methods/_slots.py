"""Rows that take part in several segments: where they go, what they take, and how their parts are added up again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch.nn.functional import pad

from attnbench.eager import wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MERGE_ROWS = 1 << 20  # rows added up at a time, so that no float32 copy of all rows exists


class Rows(NamedTuple):
    """Which rows a part reads and where they went; `taken` and `places` None where all rows stay as they are."""

    taken: Tensor | None
    """`[R']` rows in segment order"""
    places: Tensor | None
    """`[R, slots]` inverse: where each row's entries lie, -1 where there is none"""
    full: bool
    """whether every row has all its entries"""

    @classmethod
    def of(cls, entries: Tensor | None, slots: int, total: int) -> Self:
        """Of `entries: [R']`, each a `row * slots + slot` in segment order; None: all `total` rows as they are."""
        if entries is None:
            return cls(None, None, True)
        places = entries.new_full((total * slots,), -1)
        places.scatter_(0, entries, torch.arange(len(entries), device=places.device))
        return cls(entries if slots == 1 else entries // slots, places.view(total, slots), len(entries) == total * slots)

    @property
    def slots(self) -> int:
        """Segments that a row reads at most."""
        return 1 if self.places is None else self.places.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """Rows of `x: [R, ...]` in segment order."""
        return x if self.taken is None else x.index_select(0, self.taken)

    def shares(self, lse: Tensor) -> Tensor:
        """`[R, slots]` log-sum-exp of each row's entries, -inf where there is none, of `lse: [R']`."""
        if self.places is None:
            return lse[:, None]
        return lse[self.places] if self.full else pad(lse, (0, 1), value=float("-inf"))[self.places]  # -1 is the last

    def gather(self, piece: Tensor, chunk: slice, slot: int) -> Tensor:
        """Of `piece: [R', D]`, the entries in one slot of a run of rows; zero where there is none."""
        if self.places is None:
            return piece[chunk]
        places = self.places[chunk, slot]
        if self.full:
            return piece.index_select(0, places)
        return piece.index_select(0, places.clamp(min=0)).masked_fill_((places < 0)[:, None], 0.0)


def add_up(out: Tensor, pieces: Sequence[Tensor], rows: Sequence[Rows], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Write into `out: [R, D]` the sum over parts and slots of `weight * piece`, weights `[R, slots]`; added up in at least float32."""
    for start in range(0, len(out), _MERGE_ROWS):
        chunk = slice(start, start + _MERGE_ROWS)
        total = wide(out[:0]).new_zeros(out[chunk].shape)
        for p, (piece, row) in enumerate(zip(pieces, rows, strict=True)):
            for slot in range(row.slots if len(piece) else 0):
                x = row.gather(piece, chunk, slot)
                total = total.add_(x) if weights is None else total.addcmul_(x, weights[p][chunk, slot, None])
        out[chunk] = total
    return out
