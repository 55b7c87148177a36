"""Where the batches of models come from: drawn as they are needed, or picked from a set that lies on the device.

Batch i of a run is a pure function of (task, N, seed, batch size, number of examples, i). Where a recipe names a number of `examples`, the
training set is that many: first in the order in which they are drawn, then again and again, each time in another random order. A GPU gets
the set as a whole, drawn ahead, since its steps take less time than drawing a batch; so does a CPU that goes through it more than once.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, repeat
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench import distributed, drawn
from attnbench.batches import Feed, Prepared, prepared
from attnbench.tasks._draw import generator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from attnbench.recipe import Recipe
    from attnbench.tasks.trained import Split, TrainedTask


@dataclass
class Data:
    """Batches of one task for models that train on one device with one recipe; their rates may differ."""

    task: TrainedTask
    recipe: Recipe
    device: str = "cpu"
    folder: Path | None = None
    """where sets lie that other processes have drawn; None keeps none"""
    _kept: dict[Split, list[Prepared]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.task = distributed.current().share(self.task, self.recipe.batch)

    @property
    def stored(self) -> bool:
        """Whether training batches are picked from a set."""
        r = self.recipe
        return bool(r.examples) and (self.device != "cpu" or r.steps * r.batch > r.examples)

    @contextmanager
    def batches(self, first: int) -> Iterator[Iterator[Prepared | None]]:
        """Training batches `first`, `first + 1`, ...; None where the device picks them by itself, which `picked` does."""
        if not self.stored:
            with Feed(self.task, "train", self.recipe, self.device, first=first) as feed:
                yield iter(feed)
        elif self.device == "cpu":
            yield (self.picked(torch.tensor(step)) for step in count(first))
        else:
            yield repeat(None)

    def picked(self, step: Tensor) -> Prepared:
        """Training batch number `step`, a tensor on the device, without waiting for it."""
        examples, rows, slots = self._training
        return examples.pick(rows.index_select(0, step.view(1)).squeeze(0), slots)

    def held_out(self, split: Split) -> Iterable[Prepared]:
        """The batches of a held-out split that are looked at; those of a generated task's validation split stay on the device."""
        if split in self._kept:
            return self._kept[split]
        batches = self._picked_in_order(split) if self.recipe.examples and self.device != "cpu" else self._prepared(split)
        if split == "validation" and self.recipe.examples:
            self._kept[split] = list(batches)
            return self._kept[split]
        return batches

    def _prepared(self, split: Split) -> Iterator[Prepared]:
        return (prepared(self.task, split, index, self.recipe).to(self.device) for index in range(self._count(split)))

    def _picked_in_order(self, split: Split) -> Iterator[Prepared]:
        r, batches = self.recipe, self._count(split)
        rows = torch.arange(batches * r.batch).view(batches, r.batch)
        examples = drawn.load(self.task, self._key(split, rows.numel()), self.folder)
        slots, examples = examples.slots(rows), examples.to(self.device)
        return (examples.pick(part.to(self.device), slots) for part in rows)

    def _count(self, split: Split) -> int:
        return self.recipe.batches(split, self.task.available(split))

    def _key(self, split: Split, examples: int) -> drawn.Key:
        r = self.recipe
        return drawn.Key(split, r.n, r.seed if split == "train" else 0, r.batch, examples)

    @cached_property
    def _training(self) -> tuple[drawn.Examples, Tensor, int]:
        """The training set, the rows of each batch `[steps, B]`, and room for the targets of any of them."""
        r = self.recipe
        examples = drawn.load(self.task, self._key("train", min(r.examples, r.steps * r.batch)), self.folder)
        rows = order(self.task, r)
        return examples.to(self.device), rows.to(self.device), examples.slots(rows)


def order(task: TrainedTask, recipe: Recipe) -> Tensor:
    """Rows `[steps, B]` of the training set in each batch: as they were drawn, then again and again in random orders."""
    total = recipe.steps * recipe.batch
    examples = min(recipe.examples, total)
    epochs = [np.arange(examples)]
    for epoch in range(1, -(-total // examples)):
        epochs.append(generator(f"order of {task.name}", "train", recipe.n, recipe.seed, epoch).permutation(examples))
    return torch.from_numpy(np.concatenate(epochs)[:total].reshape(recipe.steps, recipe.batch))
