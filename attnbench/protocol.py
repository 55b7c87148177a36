"""How a sweep measures each of its cells."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.errors import UserError

_LONGEST_S = 2_000_000
"""operating systems count a wait in milliseconds of 31 bits"""


@dataclass(frozen=True)
class Protocol:
    """How long to measure; it changes how sure a number is, not which number is sought."""

    half_width: float = 0.01
    """stop when the 95% interval of the median is narrower than this share of it on each side"""
    budget_s: float = 1.0
    """seconds of timed calls a cell, at most; three samples are always taken"""
    max_samples: int = 200
    timeout_s: float = 120.0
    """seconds a cell may take in all before its worker is replaced"""
    gate_rows: int = 256
    """queries at which an output is held against the float64 definition"""
    aa: bool = True
    """measure one method of each point a second time, for the noise floor"""
    timed: bool = True
    """whether calls are timed; where not, cells may run beside each other"""
    breakdown: bool = False
    """after the clocks, take some calls apart by stage under a profiler"""
    energy: bool = False
    """after the clocks, meter the energy of some calls, where the GPU reports it"""

    def __post_init__(self) -> None:
        for name in ("half_width", "budget_s", "max_samples", "timeout_s", "gate_rows"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("breakdown", "energy"):
            if getattr(self, name) and not self.timed:
                raise UserError(f"{name} is of calls that are timed: leave it out, or time them")
        if self.timeout_s > _LONGEST_S:
            raise UserError(f"timeout_s = {self.timeout_s:g} must be at most {_LONGEST_S:g}, which is 23 days")
