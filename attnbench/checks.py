"""What `attnbench check` asks: every implementation at several shapes and dtypes, held by the gate against its method's definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from attnbench.check import gate
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


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    implementation: str
    shape: str
    dtype: str
    mode: str
    verdict: Literal["passed", "failed", "unsupported"]
    what: str
    """the measure that came nearest to its bound, or the reasons"""
    error: float | None = None
    bound: float | None = None

    @property
    def broken(self) -> bool:
        """Whether it failed without a number: something raised, or its process ended."""
        return self.verdict == "failed" and self.error is None


@dataclass(frozen=True)
class Check:
    """One implementation at one shape and dtype, causal or not: plain values, which any process can be asked."""

    method: str
    implementation: str
    shape: Shape
    causal: bool
    dtype: str

    def run(self, device: str) -> Finding:
        """Hold the implementation against the definition, and its gradients too where it has them."""
        method, kind = get(self.method), getattr(torch, self.dtype)
        item = method.implementation(self.implementation)
        params = method.parse({**method.params().fitted(self.shape).as_dict(), "causal": self.causal})
        problems = params.problems(self.shape) or method.reasons(item, self.shape, kind, device, params)
        backward = not method.reasons(item, self.shape, kind, device, params, backward=True)
        mode = self.mode(backward=backward)
        if problems:
            return self.finding(mode, "failed" if problems == [item.broken()] else "unsupported", "; ".join(problems))
        report(Progress(0, 1, mode))
        try:
            verdict = gate(method, item, params, draw("randn", self.shape, 0, kind, device), backward=backward)
        except Exception as error:  # an implementation may raise anything, and the others are still to be checked
            return self.finding(mode, "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return self.finding(mode, "passed" if verdict.passed else "failed", **_worst(verdict))

    def mode(self, *, backward: bool) -> str:
        """`causal forward+backward`, less what is not asked."""
        return ("causal " if self.causal else "") + ("forward+backward" if backward else "forward")

    def finding(
        self,
        mode: str,
        verdict: Literal["passed", "failed", "unsupported"],
        what: str,
        error: float | None = None,
        bound: float | None = None,
    ) -> Finding:
        """The finding of this check."""
        s = self.shape
        heads = f"{s.heads}" + (f"/{s.kv_heads}" if s.kv_heads != s.heads else "")
        shape = f"B={s.batch} H={heads} N={s.n} D={s.dim}"
        return Finding(f"{self.method}@{self.implementation}", shape, self.dtype, mode, verdict, what, error, bound)

    def __str__(self) -> str:
        return f"{self.method}@{self.implementation} N={self.shape.n} {'causal ' if self.causal else ''}{self.dtype}"


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
