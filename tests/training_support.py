"""A task small enough to be learned in seconds, and models for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import attnbench
from attnbench.case import Case
from attnbench.nn import Architecture, TinyTransformer
from attnbench.tasks.trained import Batch, TrainedTask, sequence
from attnbench.train import Recipe

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

N, CLASSES = 16, 4
SMALL: dict[str, dict[str, Any]] = {"softmax": {}, "mita": {"landmarks": 4, "topk": 4}, "agent": {"landmarks": 4}}
TOY: dict[str, Any] = {
    "task": "accuracy", "data": "mqar", "n": 16, "batch": 4, "heads": 2, "dim": 4, "steps": 4, "depth": 1, "rates": "0.001",
}  # fmt: skip


def thirty_two(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """The same 32 random sequences in every batch and split, each with a random class: nothing but memory helps."""
    g = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(32, (32, n), generator=g), torch.randint(CLASSES, (32,), generator=g)
    return Batch(inputs[:size], targets[:size], torch.ones(size, n, dtype=torch.bool), torch.arange(32)[:size])


def noise(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Another batch for every index, so that going on at the wrong one is noticed."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * index + ("train", "validation", "test").index(split))
    inputs = torch.randint(32, (size, n), generator=g)
    return Batch(inputs, inputs % CLASSES, torch.rand(size, n, generator=g) < 0.5, torch.zeros(size, n, dtype=torch.long))


def task(**changes: Any) -> TrainedTask:
    plain = {
        "name": "small", "title": "", "kind": "sequence", "vocabulary": 32, "classes": CLASSES, "causal": False, "grid": sequence,
        "chance": 1 / CLASSES, "lengths": (N,), "source": "", "batch": thirty_two,
    }  # fmt: skip
    return TrainedTask(**{**plain, **changes})


def architecture(method: str = "softmax", **changes: Any) -> Architecture:
    plain = {"vocabulary": 32, "classes": CLASSES, "tokens": N, "dim": 16, "heads": 2, "depth": 2, "positions": "learned"}
    return Architecture(method=method, params=SMALL.get(method, {}), **{**plain, **changes})


def model(method: str = "softmax", seed: int = 0, **changes: Any) -> TinyTransformer:
    torch.manual_seed(seed)
    return TinyTransformer(architecture(method, **changes))


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"steps": 12, "rate": 3e-3, "batch": 8, "n": N, "evaluations": 3, **changes})


def case(method: str = "softmax", params: dict[str, object] | None = None, **changes: Any) -> Case:
    """A case that trains for a few steps at toy size."""
    values = tuple(sorted(attnbench.get(method).parse(params or {}).as_dict().items()))
    return Case(**{**TOY, "method": method, "params": values, **changes})
