"""The work and the memory traffic of a call, counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.params import Shape


@dataclass(frozen=True)
class Work:
    """What one stage must do."""

    flops: int
    bytes: int
    """memory traffic; 0 where the model does not tell stages apart"""

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)


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
    traffic: Mapping[str, int] = field(default_factory=dict)
    """stage -> elements of the input dtype that it reads and writes where it is a pass of its own, gathers with multiplicity"""
    index_traffic: Mapping[str, int] = field(default_factory=dict)
    """stage -> bytes of indices that it reads and writes likewise"""

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
        traffic: Mapping[str, int] | None = None,
        index_traffic: Mapping[str, int] | None = None,
    ) -> Self:
        """A cost whose traffic is q, k, v and the output once, plus `extra` elements."""
        return cls(dict(flops), cls.once(shape) + extra, index_bytes, recomputes, selection, dict(traffic or {}), dict(index_traffic or {}))

    @staticmethod
    def once(shape: Shape) -> int:
        """Elements of q, k, v and the output."""
        return shape.batch * (shape.heads * shape.n + shape.kv_heads * shape.keys) * (shape.dim + shape.dim_v)

    def total(self, mode: str = "forward") -> int:
        """FLOP of `forward` or `forward+backward`."""
        forward = sum(self.flops.values())
        if mode == "forward":
            return forward
        differentiated = forward - sum(self.flops.get(stage, 0) for stage in self.selection)
        return forward + (5 * differentiated // 2 if self.recomputes else 2 * differentiated)

    def bytes(self, element_size: int, mode: str = "forward") -> int:
        """Compulsory memory traffic; the backward pass reads and writes each tensor and its gradient once."""
        forward = self.elements * element_size + self.index_bytes
        return forward if mode == "forward" else 3 * forward

    def by_stage(self, element_size: int) -> dict[str, Work]:
        """Work of each stage of the forward pass; the traffic of separate passes, which is more than the compulsory `bytes`."""
        names = dict.fromkeys((*self.flops, *self.traffic, *self.index_traffic))
        return {s: Work(self.flops.get(s, 0), self.traffic.get(s, 0) * element_size + self.index_traffic.get(s, 0)) for s in names}

    def gradients(self, element_size: int) -> dict[str, Work]:
        """Work of the backward pass of each stage that has one; the stage's traffic twice, since gradients cross too."""
        halves = 5 if self.recomputes else 4
        stages = self.by_stage(element_size).items()
        return {s: Work(halves * w.flops // 2, 2 * w.bytes) for s, w in stages if s not in self.selection}
