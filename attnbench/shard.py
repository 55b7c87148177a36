"""A part of a sweep, for job arrays: every machine computes the same partition, so that none has to be told about the others."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from attnbench.errors import UserError
from attnbench.store import series_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnbench.case import Case

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N`. Raises `UserError` unless 1 <= I <= N."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--shard {text}: write it as I/N with I from 1 to N, as 3/8")
        return cls(int(match[1]), int(match[2]))

    def take(self, cases: Mapping[Case, T]) -> dict[Case, T]:
        """This part of the cases, in their order.

        Whole series are dealt, in the order of their hashes: all lengths of a method under the same conditions, and its A/A repeats, run
        in one place, so that what runs out of memory or time is skipped at greater lengths as it is in an undivided run.
        """
        series = {case: series_of(case) for case in cases}
        ours = set(sorted(set(series.values()))[self.index - 1 :: self.count])
        return {case: value for case, value in cases.items() if series[case] in ours}
