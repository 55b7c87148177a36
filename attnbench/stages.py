"""Stages of an attention call: one vocabulary for what is measured and what is counted, and the mark that code puts around its own.

Outside `marking` a mark does nothing. `X gradient` is the backward pass of stage X, for kernels that can tell it.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager

STAGES: dict[str, str] = {
    "project": "learned maps of tokens, and gates",
    "pool": "averages or sums of tokens: landmarks, block means",
    "state": "keys and values folded into one matrix, which queries read instead of them",
    "score": "products of queries and keys that only decide which keys are read",
    "probe": "landmarks against every key: the scores that choose keys, and what a landmark reads where one pass makes both",
    "compress": "landmarks read keys and values",
    "invert": "the matrix of landmarks against landmarks: made, inverted and applied",
    "select": "the largest scores: the keys of an expert or of a query",
    "route": "the experts of a query: its scores with landmarks or block means, and the choice",
    "permute": "queries grouped by expert: sorted, counted, copied in that order",
    "gather": "chosen keys and values copied side by side",
    "attend": "queries read keys and values, or a state: scores, softmax, weighted sum",
    "merge": "partial outputs of a query joined by their log-sum-exp",
    "backward": "gradients that no kernel's name tells apart by stage",
    "other": "what no mark and no kernel's name claims",
}
"""Stage -> what it does, in the order of a call."""

GRADIENT = " gradient"
"""Ends the name of a stage's backward pass."""

PREFIX = "attnbench stage: "
"""Begins the profiler's name of a mark."""

_WITHIN: dict[str, tuple[str, ...]] = {
    "pool": ("state", "probe", "compress"),
    "score": ("attend",),
    "probe": ("compress", "score"),
    "compress": ("probe",),
    "select": ("score", "probe", "route"),
    "route": ("attend",),
    "permute": ("route", "attend"),
    "gather": ("attend", "permute"),
    "merge": ("attend",),
    "read": ("attend",),
    "normalise": ("attend",),
}
"""Stage of a cost model -> stages whose kernels do its work too, where they are not told apart; nearest first."""


def known(name: str) -> bool:
    """Whether `name` is a stage, or the backward pass of one."""
    return name.removesuffix(GRADIENT) in STAGES


def home(counted: str, measured: Collection[str]) -> str:
    """The stage among `measured` whose kernels do the work that a cost model counts as `counted`; `other` where none does."""
    stage = counted.removesuffix(GRADIENT)
    if stage == counted:
        return next((s for s in (stage, *_WITHIN.get(stage, ())) if s in measured), "other")
    own = (s + GRADIENT for s in (stage, *_WITHIN.get(stage, ())))
    return next((s for s in (*own, "backward") if s in measured), "other")


def rank(name: str) -> tuple[bool, int]:
    """Place of a stage in a call: the forward pass in the order of `STAGES`, then gradients likewise, then what is not told apart."""
    order, stage = list(STAGES), name.removesuffix(GRADIENT)
    return name.endswith(GRADIENT) or name in ("backward", "other"), order.index(stage)


_marking = False


def stage(name: str) -> AbstractContextManager[object]:
    """Mark what runs inside as stage `name` of `STAGES`, for a breakdown that is being taken; does nothing otherwise.

    Raises `ValueError` for a name that is no stage, while a breakdown is taken.
    """
    if not _marking:
        return nullcontext()
    if not known(name):
        raise ValueError(f"{name!r} is no stage: choose from {', '.join(STAGES)}")
    return torch.profiler.record_function(PREFIX + name)


@contextmanager
def marking() -> Iterator[None]:
    """While open, marks reach the profiler."""
    global _marking  # noqa: PLW0603 (a mark must cost one look at it, in whichever thread)
    _marking = True
    try:
        yield
    finally:
        _marking = False
