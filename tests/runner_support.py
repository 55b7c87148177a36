"""Small suites for tests of sweeps."""

from __future__ import annotations

from pathlib import Path

from attnbench import runner
from attnbench.protocol import Protocol
from attnbench.suite import Entry, Suite

PLUGIN = Path(__file__).parent / "bad_methods"
QUICK = Protocol(half_width=0.5, budget_s=0.02, max_samples=4, timeout_s=6.0, aa=False)


def suite(*methods: str, n: tuple[int, ...] = (32,), protocol: Protocol = QUICK, **axes: tuple) -> Suite:
    fixed = {"n": n, "heads": (2,), "dim": (8,), "dtype": ("float32",), **axes}
    return Suite("trial", "", "", "speed", tuple(Entry(m) for m in methods), fixed, protocol)


def sweep(s: Suite, results: Path, **options) -> runner.Summary:
    return runner.sweep(s, results, device="cpu", plugins=[PLUGIN], **options)
