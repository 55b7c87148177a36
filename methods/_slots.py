"""Rows that take part in several segments: where they go, what they take, and how their parts are added up again."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch.nn.functional import embedding_bag, pad

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Which rows a part reads and where they went; both None where all rows stay as they are."""

    taken: Tensor | None
    """`[R']` rows in segment order"""
    places: Tensor | None
    """`[R, slots]` inverse: where each row's entries lie, -1 where there is none"""

    @classmethod
    def of(cls, entries: Tensor | None, slots: int, total: int) -> Self:
        """Of `entries: [R']`, each a `row * slots + slot` in segment order; None: all `total` rows as they are."""
        if entries is None:
            return cls(None, None)
        places = entries.new_full((total * slots,), -1)
        places.scatter_(0, entries, torch.arange(len(entries), device=places.device))
        return cls(entries if slots == 1 else entries // slots, places.view(total, slots))

    def take(self, x: Tensor) -> Tensor:
        """Rows of `x: [R, ...]` in segment order."""
        return x if self.taken is None else x[self.taken]

    def shares(self, lse: Tensor) -> Tensor:
        """`[R, slots]` log-sum-exp of each row's entries, -inf where there is none, of `lse: [R']`."""
        if self.places is None:
            return lse[:, None]
        if len(lse) == self.places.numel():
            return lse[self.places]
        return pad(lse, (0, 1), value=float("-inf"))[self.places]  # -1 is the last


def slot_sum(piece: Tensor, places: Tensor, weight: Tensor | None, *, full: bool) -> Tensor:
    """`sum_s weight[r, s] * piece[places[r, s]]`, `[R, D]`, gathered, weighted and added up in one pass.

    `full` promises that every row has all its entries; else a place of -1 counts nothing.
    """
    if full:
        return embedding_bag(places, piece, per_sample_weights=weight, mode="sum")
    weight = (places >= 0).to(piece.dtype) if weight is None else weight
    return embedding_bag(places.clamp(min=0), piece, per_sample_weights=weight, mode="sum")
