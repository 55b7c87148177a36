"""Sets of examples, drawn once and held in few bytes: learning rates, methods and processes that train on the same task share them.

A set of a split is its first examples, in the order in which batches 0, 1, ... hold them. It is a pure function of (task, split, N, seed,
batch size, count), so that it can be drawn by many processes at once and again on any machine. On disk it is known by these and by a hash
of its first batch, so that another generator never reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnbench.batches import IGNORED, Prepared
from attnbench.errors import UserError
from attnbench.files import alone, replacing
from attnbench.tasks import trained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from attnbench.tasks.trained import Batch, Split, TrainedTask

_FORMAT = 1
_WORTH = 64
"""batches that make another process worth its start"""


@dataclass(frozen=True)
class Key:
    """Which examples: those of batches 0, 1, ... of a split, `count` of them."""

    split: Split
    n: int
    seed: int
    batch: int
    count: int

    @property
    def batches(self) -> int:
        """Batches that hold them."""
        return -(-self.count // self.batch)


@dataclass(frozen=True)
class Examples:
    """Examples side by side, on one device."""

    inputs: Tensor
    """`[M, N]` in the smallest integers that hold them, or `[M, N, F]` float"""
    targets: Tensor
    """`[M]`, or `[A]`: of all tokens that count, example after example"""
    groups: Tensor
    """of the shape of `targets`"""
    mask: Tensor | None = None
    """`[M, N]` bool: tokens that are no padding; None where every token is one, or where each has its own class"""
    places: Tensor | None = None
    """`[A]`: place within its example of each token that counts; None for a class an example"""
    first: Tensor | None = None
    """`[M + 1]`: where the tokens of each example begin among the A"""

    def to(self, device: str) -> Examples:
        """On a device."""
        return Examples(**{name: x.to(device) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def slots(self, rows: Tensor) -> int:
        """The largest number of targets of the batches `rows: [.., B]`, for which `pick` then makes room."""
        if self.first is None:
            return rows.shape[-1]
        return int(self.first.diff()[rows].sum(-1).max())

    def pick(self, rows: Tensor, slots: int) -> Prepared:
        """The batch of the examples `rows: [B]`, of shapes that do not depend on them: without waiting for the device.

        Of a class a token it has `slots` targets, the last of which are `IGNORED` where fewer tokens count.
        """
        inputs = self.inputs[rows] if self.inputs.is_floating_point() else self.inputs[rows].long()
        if self.first is None or self.places is None:
            mask = None if self.mask is None else self.mask[rows]
            return Prepared(inputs, self.targets[rows].long(), self.groups[rows].long(), None, mask)
        begin = self.first[rows]
        count = self.first[rows + 1] - begin
        ends = count.cumsum(0)
        slot = torch.arange(slots, device=rows.device)
        row = torch.searchsorted(ends, slot, right=True).clamp(max=len(rows) - 1)
        used = slot < ends[-1]
        at = torch.where(used, (begin - ends + count)[row] + slot, 0)
        positions = torch.where(used, row * inputs.shape[1] + self.places[at].long(), 0)
        targets = torch.where(used, self.targets[at].long(), IGNORED)
        return Prepared(inputs, targets, self.groups[at].long(), positions, None)


def load(task: TrainedTask, key: Key, folder: Path | None = None) -> Examples:
    """The examples, on the CPU: read from `folder` where another process has drawn them, else drawn, and written there for the next."""
    start = task.batch(key.split, 0, key.batch, key.n, key.seed)
    if folder is None:
        return _drawn(task, key)
    path = folder / f"{_name(task, key, start)}.pt"
    with alone(path):
        found = _read(path)
        if found is None:
            found = _drawn(task, key)
            _write(path, found)
    return found


def joined(parts: Sequence[Examples], count: int | None = None) -> Examples:
    """One set of the examples of several, at most `count`."""
    together = {name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors() if name not in ("first", "mask")}
    if any(p.mask is not None for p in parts):
        together["mask"] = torch.cat([torch.ones(p.inputs.shape[:2], dtype=torch.bool) if p.mask is None else p.mask for p in parts])
    if parts[0].first is not None:
        counts = torch.cat([p.first.diff() for p in parts if p.first is not None])
        together["first"] = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    whole = Examples(**together)
    return whole if count is None else _cut(whole, count)


def _cut(whole: Examples, count: int) -> Examples:
    """The first `count` examples."""
    asked = count if whole.first is None else int(whole.first[count])
    sizes = {"inputs": count, "mask": count, "first": count + 1, "targets": asked, "groups": asked, "places": asked}
    return Examples(**{name: x[: sizes[name]] for name, x in whole.tensors().items()})


def compact(task: TrainedTask, batch: Batch) -> Examples:
    """The examples of one batch."""
    inputs = batch.inputs if batch.inputs.is_floating_point() else batch.inputs.to(_smallest(task.vocabulary))
    if not task.per_token:
        mask = None if bool(batch.mask.all()) else batch.mask
        return Examples(inputs, batch.targets.to(torch.int32), batch.groups.to(torch.int32), mask)
    row, place = batch.mask.nonzero(as_tuple=True)
    groups = batch.groups if batch.groups.ndim == 2 else batch.groups[:, None].expand_as(batch.targets)
    first = torch.cat([torch.zeros(1, dtype=torch.long), batch.mask.sum(1).cumsum(0)])
    targets, groups = (x[row, place].to(torch.int32) for x in (batch.targets, groups))
    return Examples(inputs, targets, groups, places=place.to(torch.int32), first=first)


def _smallest(values: int) -> torch.dtype:
    """The integers that hold 0 to `values - 1`."""
    return torch.uint8 if values <= 1 << 8 else torch.int16 if values <= 1 << 15 else torch.int32


def _drawn(task: TrainedTask, key: Key) -> Examples:
    """Drawn now, by as many processes as are worth it where they can import the task."""
    workers = min(os.cpu_count() or 1, key.batches // _WORTH)
    if workers > 1 and trained.by_name(task):
        return joined(_by_processes(task.name, key, workers), key.count)
    return joined([part(task, key, 0, key.batches)], key.count)


def part(task: TrainedTask, key: Key, begin: int, end: int) -> Examples:
    """The examples of batches `begin` to `end - 1`."""
    return joined([compact(task, task.batch(key.split, i, key.batch, key.n, key.seed)) for i in range(begin, end)])


def _by_processes(name: str, key: Key, workers: int) -> list[Examples]:
    """Equal parts, each drawn by a process that ends before this one, or with it. Raises `UserError` where one fails."""
    edges = [key.batches * i // workers for i in range(workers + 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(prefix="attnbench-drawn-") as folder:
        paths = [Path(folder) / f"{i}.pt" for i in range(workers)]
        processes = []
        for path, begin, end in zip(paths, edges, edges[1:], strict=False):
            words = json.dumps([name, vars(key), begin, end, str(path), os.getpid()])
            command = [sys.executable, "-c", "import sys; from attnbench.drawn import main; main(sys.argv[1])", words]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, said = process.communicate()
            if process.returncode:
                last = said.strip().splitlines()[-1:] or [f"exited with {process.returncode}"]
                raise UserError(f"examples of {name} could not be drawn: {last[0]}")
        return [Examples(**torch.load(path, weights_only=True)) for path in paths]


def main(words: str) -> None:
    """Draw one part into a file: what a process of `load` runs. It ends where its parent has."""
    name, key, begin, end, path, parent = json.loads(words)
    task, parts = trained.get(name), []
    for start in range(begin, end, _WORTH):
        if os.getppid() != parent:
            return
        parts.append(part(task, Key(**key), start, min(end, start + _WORTH)))
    torch.save(joined(parts).tensors(), path)


def _name(task: TrainedTask, key: Key, start: Batch) -> str:
    text = f"{_FORMAT}/{task.name}/{vars(key)}/{start.digest}"
    return f"{task.stem}-{key.n}-{key.split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _read(path: Path) -> Examples | None:
    try:
        return Examples(**torch.load(path, weights_only=True, mmap=True))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return None


def _write(path: Path, found: Examples) -> None:
    """For the next that asks; a disk without room costs time, not the run."""
    with suppress(OSError, RuntimeError), replacing(path) as fresh:
        torch.save(found.tensors(), fresh)
