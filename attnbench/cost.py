"""The work and the memory traffic of a call, counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.params import Shape


@dataclass(frozen=True)
class Cost:
    """Work of one forward call over the whole batch, all heads.

    A multiply-add is 2 FLOP; matrix products are counted over the pairs really scored; exp and division are not.
    """

    flops: Mapping[str, int]
    """stage -> FLOP of the forward pass"""
    elements: int
    """elements of the input dtype that must cross device memory: inputs once, output once, gathers with multiplicity"""
    index_bytes: int = 0
    """bytes of indices and statistics that must exist in memory"""
    recomputes: bool = True
    """whether the backward pass computes the scores again (2.5 times the forward work, else 2)"""
    selection: tuple[str, ...] = ()
    """stages that only choose keys or experts: no gradient passes them, so the backward pass leaves them out"""

    @classmethod
    def of(
        cls,
        shape: Shape,
        flops: Mapping[str, int],
        *,
        extra: int = 0,
        index_bytes: int = 0,
        recomputes: bool = True,
        selection: tuple[str, ...] = (),
    ) -> Self:
        """A cost whose traffic is q, k, v and the output once, plus `extra` elements."""
        s = shape
        io = s.batch * (s.heads * s.n * (s.dim + s.dim_v) + s.kv_heads * s.keys * (s.dim + s.dim_v))
        return cls(dict(flops), io + extra, index_bytes, recomputes, selection)

    def total(self, mode: str = "forward") -> int:
        """FLOP of `forward` or `forward+backward`."""
        forward = sum(self.flops.values())
        if mode == "forward":
            return forward
        differentiated = forward - sum(self.flops[stage] for stage in self.selection)
        return forward + (5 * differentiated // 2 if self.recomputes else 2 * differentiated)

    def bytes(self, element_size: int, mode: str = "forward") -> int:
        """Compulsory memory traffic; the backward pass reads and writes each tensor and its gradient once."""
        forward = self.elements * element_size + self.index_bytes
        return forward if mode == "forward" else 3 * forward
