"""A method's contract beside its implementations, as `attnbench check` asks it: which parts, and where. `promises.py` holds each.

All of it is asked on the CPU in float64, whatever device implementations are checked on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attnbench import promises
from attnbench.checks import Finding, Verdict, text
from attnbench.errors import raised
from attnbench.method import Shape
from attnbench.promises import settled
from attnbench.registry import get

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from attnbench.method import Method, Params
    from attnbench.promises import Outcome

_SMALL = (Shape(2, 2, 64, 32), Shape(1, 4, 100, 32, 2))
"""squares, for grids; the second with fewer key heads than query heads, where a method takes that"""


@dataclass(frozen=True)
class Part:
    """One part of a method's contract: plain values, which any process can be asked."""

    method: str
    name: str
    """key of `PARTS`"""
    shape: Shape
    causal: bool = False

    @property
    def subject(self) -> str:
        """Whose it is."""
        return self.method

    @property
    def compiles(self) -> bool:
        """Nothing here is compiled."""
        return False

    def run(self, device: str) -> Finding:  # noqa: ARG002 (a definition is held on the CPU)
        """Hold the method to this part."""
        method, mode = get(self.method), self.mode()
        try:
            params, reasons = settled(method, self.shape, causal=self.causal)
            if reasons and self.name in _CALLS:
                return self.finding(mode, "unsupported", "; ".join(reasons))
            outcome = PARTS[self.name](method, self.shape, params)
        except Exception as error:  # a plugin may raise anything, and the other parts are still to be checked
            return self.finding(mode, "failed", raised(error))
        return self.finding(mode, outcome.verdict, outcome.what, outcome.error, outcome.bound)

    def mode(self, *, backward: bool = False) -> str:  # noqa: ARG002 (definitions are not differentiated here)
        """`causal experts`"""
        return ("causal " if self.causal and self.name != "causality" else "") + self.name

    def finding(self, mode: str, verdict: Verdict, what: str, error: float | None = None, bound: float | None = None) -> Finding:
        """The finding of this part."""
        shape, dtype = (text(self.shape), "float64") if self.name in _CALLS else ("", "")
        return Finding(self.method, shape, dtype, mode, verdict, what, error, bound)

    def __str__(self) -> str:
        return f"{self.method} {self.mode()}"


def parts(method: Method) -> Iterator[Part]:
    """The contract of a method; nothing where an implementation is pinned, which is then all that is asked about."""
    if method.pinned:
        return
    modes = (False,) if method.limits.no_causal else (False, True)
    small = _SMALL if method.limits.gqa else tuple(replace(shape, kv_heads=shape.heads) for shape in _SMALL)
    yield Part(method.name, "declaration", _SMALL[0])
    for name in ("reference", "experts"):
        if name == "experts" and method.experts is None:  # said once
            yield Part(method.name, name, _SMALL[0])
        else:
            yield from (Part(method.name, name, shape, causal) for shape in small for causal in modes)
    yield Part(method.name, "heads", Shape(1, 3, 400, 32))  # long enough that regions are left out
    yield Part(method.name, "causality", Shape(1, 2, 80, 32), causal=True)
    yield Part(method.name, "coordinates", _SMALL[0])
    yield from (Part(method.name, "cost", Shape(1, 2, 256, 16), causal) for causal in modes)


PARTS: dict[str, Callable[[Method, Shape, Params], Outcome]] = {
    "declaration": promises.declaration,
    "reference": promises.reference,
    "experts": promises.experts,
    "heads": promises.heads,
    "causality": promises.causality,
    "coordinates": promises.coordinates,
    "cost": promises.cost,
}
"""Part of the contract -> what holds a method to it at a shape."""
_CALLS = ("reference", "experts", "heads", "causality", "cost")
"""parts that ask about a call of some shape"""
