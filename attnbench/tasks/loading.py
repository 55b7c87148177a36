"""Batches drawn ahead of time in worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader, Dataset

from attnbench.tasks.trained import Batch

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split, TrainedTask


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    task: TrainedTask
    split: Split
    size: int
    n: int
    seed: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Batch:
        if not 0 <= place < self.count:
            raise IndexError(place)
        return self.task.batch(self.split, self.first + place, self.size, self.n, self.seed)


def loader(
    task: TrainedTask, split: Split, *, size: int, n: int, seed: int, count: int, first: int = 0, workers: int = 0
) -> DataLoader[Batch]:
    """Batches `first`, `first + 1`, ... of a split, `count` of them, in order and the same for any number of `workers`.

    Since a batch is a pure function of its number, a run that goes on at `first` sees what it would have seen.
    """
    data = _Batches(task, split, size, n, seed, first, count)
    return DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=False)
