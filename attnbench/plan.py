"""What a suite would cost, from the methods' cost models alone: no GPU, no tensor.

The time of a call is the roofline floor `max(FLOP / rate, bytes / bandwidth)`: no call is faster, and most are slower. Its memory
is what any implementation must hold: q, k, v, the output, indices, and with a backward pass the gradients of all four. What an
implementation writes beside that (as the N x N scores of an eager one) is not known here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from attnbench.case import Case
    from attnbench.suite import Suite

_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LEAST_SAMPLES = 3


@dataclass(frozen=True)
class Ceilings:
    """The most that a device can do."""

    source: str
    bytes_per_s: float
    """memory bandwidth"""
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """dtype -> rate of matrix products"""

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or any(rate <= 0 for rate in self.flops_per_s.values()):
            raise UserError("bandwidth and rate of a device must be above 0")


H100 = Ceilings(
    "NVIDIA H100 SXM data sheet, dense, without sparsity; float32 without TF32",
    bytes_per_s=3.35e12,
    flops_per_s={"float64": 67e12, "float32": 67e12, "bfloat16": 989e12, "float16": 989e12},
)
"""Assumed where nothing else is given. Source: https://www.nvidia.com/en-us/data-center/h100/"""


@dataclass(frozen=True)
class Prediction:
    """One cell before it runs."""

    case: Case
    flops: int
    """of one call"""
    bytes: int
    """compulsory memory traffic of one call"""
    least_bytes: int
    """memory that any implementation holds"""
    floor_s: float
    """no call is faster"""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        own = {k: v for k, v in vars(self).items() if k != "case"}
        return {"method": self.case.label, "n": self.case.n, "mode": self.case.mode, **own, "case": self.case.as_dict()}


def predict(case: Case, ceilings: Ceilings = H100) -> Prediction:
    """Work, traffic, memory and the least time of one case. Raises `UserError` for a method or parameter that does not exist."""
    method, params = case.resolve()
    cost, size = method.cost(case.shape, params), _ELEMENT_BYTES[case.dtype]
    flops, moved = cost.total(case.mode), cost.bytes(size, case.mode)
    rate = ceilings.flops_per_s[case.dtype]
    return Prediction(case, flops, moved, _least_bytes(case, size) + cost.index_bytes, max(flops / rate, moved / ceilings.bytes_per_s))


def _least_bytes(case: Case, size: int) -> int:
    s = case.shape
    tensors = s.batch * (s.heads * s.n * (s.dim + s.dim_v) + s.kv_heads * s.keys * (s.dim + s.dim_v))
    return tensors * size * (2 if case.mode == "forward+backward" else 1)


@dataclass(frozen=True)
class Total:
    """A suite before it runs."""

    cells: int
    flops: int
    """of one call of each cell"""
    floor_s: float
    """of one call of each cell"""
    timed_s: float
    """of all timed calls, as long as none outlasts its budget; gate, compilation and warm-up come on top"""
    largest_bytes: int
    """the most that any cell must hold"""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def total(predictions: Iterable[Prediction], suite: Suite) -> Total:
    """Sums over a suite."""
    cells = list(predictions)
    budget = suite.protocol.budget_s
    return Total(
        len(cells),
        sum(p.flops for p in cells),
        sum(p.floor_s for p in cells),
        sum(max(_LEAST_SAMPLES * p.floor_s, min(budget, suite.protocol.max_samples * p.floor_s)) for p in cells),
        max((p.least_bytes for p in cells), default=0),
    )
