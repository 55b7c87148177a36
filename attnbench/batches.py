"""Batches on their way to a model: drawn ahead of time on the CPU, pinned, and moved without waiting."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from attnbench.recipe import Recipe
    from attnbench.tasks.trained import Split, TrainedTask

_AHEAD = 4
IGNORED = -100
"""target of a place that was only added so that all batches have one shape"""


@dataclass(frozen=True)
class Prepared:
    """A batch as a model reads it."""

    inputs: Tensor
    """`[B, N]` long or `[B, N, F]` float"""
    targets: Tensor
    """`[T]` long: a class for each example, or for each token that counts; `[T, classes]` float where classes are mixed. `IGNORED` where
    a place does not count"""
    groups: Tensor
    """`[T]` long: the slice of each"""
    positions: Tensor | None
    """`[T]` long: places of the tokens that count among `B * N`; None for a class an example"""
    mask: Tensor | None
    """`[B, N]` bool: tokens that are no padding; None where every token is one, or where each has its own class"""

    def shares(self) -> Tensor:
        """`[T]` float: what each target adds to a mean over examples of the means over their targets; of a class a token."""
        assert self.positions is not None, "a class an example has one target each"
        count, n = self.inputs.shape[:2]
        row, used = self.positions // n, (self.targets != IGNORED).float()
        asked = torch.zeros(count, device=used.device).index_add(0, row, used)
        return used / asked.index_select(0, row).clamp(min=1) / (asked > 0).sum()

    def to(self, device: str) -> Prepared:
        """On a device, without waiting for it where memory is pinned."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Prepared:
        """In memory from which a GPU copies by itself."""
        return self._each(lambda x: x.pin_memory())

    def copy(self) -> Prepared:
        """In memory of its own."""
        return self._each(lambda x: x.clone())

    def alike(self, other: Prepared) -> bool:
        """Whether another batch has tensors of the same sizes and kinds."""
        mine, theirs = ({name: (x.shape, x.dtype) for name, x in batch._present().items()} for batch in (self, other))
        return mine == theirs

    def fill(self, other: Prepared) -> None:
        """Take over what another batch holds, in the same memory."""
        theirs = other._present()
        for name, x in self._present().items():
            x.copy_(theirs[name], non_blocking=True)

    def keep_for(self, stream: Any) -> None:
        """Let its memory be, until what was queued on a stream is done."""
        for x in self._present().values():
            x.record_stream(stream)

    def _present(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prepared:
        return replace(self, **{name: change(x) for name, x in self._present().items()})


def prepared(task: TrainedTask, split: Split, index: int, recipe: Recipe) -> Prepared:
    """Batch `index` of a split, on the CPU. What counts is found here, so that no GPU has to be asked for it."""
    batch = task.batch(split, index, recipe.batch, recipe.n, recipe.seed if split == "train" else 0)
    inputs = batch.inputs if batch.inputs.is_floating_point() else batch.inputs.long()
    if not task.per_token:
        targets = batch.targets if batch.targets.is_floating_point() else batch.targets.long()
        return Prepared(inputs, targets, batch.groups.long(), None, None if bool(batch.mask.all()) else batch.mask)
    positions = batch.mask.flatten().nonzero().squeeze(1)
    groups = batch.groups if batch.groups.ndim == 2 else batch.groups[:, None].expand_as(batch.targets)
    return Prepared(inputs, batch.targets.flatten()[positions].long(), groups.flatten()[positions].long(), positions, None)


class Feed:
    """Batches `first`, `first + 1`, ... of a split on a device, for a GPU some batches ahead. Use it as a context manager."""

    def __init__(self, task: TrainedTask, split: Split, recipe: Recipe, device: str, *, first: int = 0) -> None:
        self.task, self.split, self.recipe, self.device, self.next = task, split, recipe, device, first
        workers = max(1, min(_AHEAD, (os.cpu_count() or 2) // 2))
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        begin = None if gpu is None else lambda: torch.cuda.set_device(gpu)  # where the thread pins memory
        self._pool = ThreadPoolExecutor(workers, initializer=begin) if device != "cpu" else None
        self._waiting: deque[Future[Prepared]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Prepared]:
        while True:
            if self._pool is None:
                yield prepared(self.task, self.split, self.next, self.recipe)
            else:
                while len(self._waiting) < _AHEAD:
                    self._waiting.append(self._pool.submit(self._draw, self.next + len(self._waiting)))
                yield self._waiting.popleft().result().to(self.device)
            self.next += 1

    def _draw(self, index: int) -> Prepared:
        found = prepared(self.task, self.split, index, self.recipe)
        return found.pinned() if torch.cuda.is_available() else found
