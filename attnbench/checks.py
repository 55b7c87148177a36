"""What `attnbench check` asks of implementations: each at several shapes and dtypes, held by the gate against its method's definition.

What it asks of a method beside them is in `contract.py`; both find a `Finding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from attnbench.check import gate
from attnbench.errors import raised
from attnbench.inputs import draw
from attnbench.isolate import Progress, report
from attnbench.method import Shape
from attnbench.registry import get

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attnbench.method import Method
    from attnbench.record import Gate

_SHAPES = (Shape(2, 2, 63, 32), Shape(1, 4, 100, 64, 2), Shape(1, 2, 257, 64))
"""odd lengths, and fewer key heads than query heads"""
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
Verdict = Literal["passed", "failed", "unsupported"]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    implementation: str
    """`method@implementation`, or the method's name where its contract is checked"""
    shape: str
    dtype: str
    mode: str
    """`causal forward+backward`, or the part of the contract"""
    verdict: Verdict
    what: str
    """the measure that came nearest to its bound, what was held, or the reasons"""
    error: float | None = None
    bound: float | None = None

    @property
    def broken(self) -> bool:
        """Whether it failed without a number: something raised, or its process ended."""
        return self.verdict == "failed" and self.error is None


class Asked(Protocol):
    """A question that is answered by a finding: `Check` here, `Part` of a contract."""

    @property
    def subject(self) -> str:
        """What it is about: `method@implementation`, or a method."""

    @property
    def compiles(self) -> bool:
        """Whether kernels are compiled for it."""

    def run(self, device: str) -> Finding:
        """Answer it."""

    def mode(self, *, backward: bool) -> str:
        """What a finding shows as its mode."""

    def finding(self, mode: str, verdict: Verdict, what: str, error: float | None = None, bound: float | None = None) -> Finding:
        """A finding of this question."""


def text(shape: Shape) -> str:
    """`B=1 H=4/2 N=100 D=64`"""
    heads = f"{shape.heads}" + (f"/{shape.kv_heads}" if shape.kv_heads != shape.heads else "")
    return f"B={shape.batch} H={heads} N={shape.n} D={shape.dim}"


@dataclass(frozen=True)
class Check:
    """One implementation at one shape and dtype, causal or not: plain values, which any process can be asked."""

    method: str
    implementation: str
    shape: Shape
    causal: bool
    dtype: str

    @property
    def subject(self) -> str:
        """`method@implementation`"""
        return f"{self.method}@{self.implementation}"

    @property
    def compiles(self) -> bool:
        """Whether it needs a package: such bring kernels of their own, compiled when they first run; all else is made of torch's."""
        return bool(get(self.method).implementation(self.implementation).requires)

    def run(self, device: str) -> Finding:
        """Hold the implementation against the definition, and its gradients too where it has them."""
        mode = self.mode(backward=False)
        try:
            method, kind = get(self.method), getattr(torch, self.dtype)
            item = method.implementation(self.implementation)
            params = method.parse({**method.params().fitted(self.shape).as_dict(), "causal": self.causal})
            problems = params.problems(self.shape) or method.reasons(item, self.shape, kind, device, params)
            backward = not method.reasons(item, self.shape, kind, device, params, backward=True)
            mode = self.mode(backward=backward)
            if problems:
                return self.finding(mode, "failed" if problems == [item.broken()] else "unsupported", "; ".join(problems))
            report(Progress(0, 1, mode))
            verdict = gate(method, item, params, draw("randn", self.shape, 0, kind, device), backward=backward)
        except Exception as error:  # a plugin may raise anything, and the others are still to be checked
            return self.finding(mode, "failed", raised(error))
        return self.finding(mode, "passed" if verdict.passed else "failed", **_worst(verdict))

    def mode(self, *, backward: bool) -> str:
        """`causal forward+backward`, less what is not asked."""
        return ("causal " if self.causal else "") + ("forward+backward" if backward else "forward")

    def finding(self, mode: str, verdict: Verdict, what: str, error: float | None = None, bound: float | None = None) -> Finding:
        """The finding of this check."""
        return Finding(self.subject, text(self.shape), self.dtype, mode, verdict, what, error, bound)

    def __str__(self) -> str:
        return f"{self.subject} N={self.shape.n} {'causal ' if self.causal else ''}{self.dtype}"


def checks(method: Method, device: str) -> Iterator[Check]:
    """Every implementation of a method (or the pinned one) at several shapes and dtypes, causal too."""
    for item in [method.implementation(method.pinned)] if method.pinned else method.all_implementations():
        for shape in _SHAPES:
            for causal in (False, True):
                for dtype in _DTYPES[device]:
                    yield Check(method.name, item.name, shape, causal, dtype)


def _worst(verdict: Gate) -> dict[str, Any]:
    """The measure nearest to, or furthest beyond, its bound."""
    name = max(verdict.errors, key=lambda key: verdict.errors[key] / max(verdict.bounds[key], 1e-300))
    return {"what": name, "error": verdict.errors[name], "bound": verdict.bounds[name]}
