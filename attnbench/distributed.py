"""Several processes, one GPU each, that train one model together, as `accelerate launch` or `torchrun` starts them.

Every process holds the whole model and draws its own share of each batch; gradients are averaged. Process 0 runs the suite as if it were
alone: it alone writes records and checkpoints, and tells of damaged files only where it met them. The others `follow`: they wait for the
cells that it trains and take part in them. They meet at the port behind the launcher's, anew for each worker process of 0. Where one fails,
the launcher ends them all: run again with `--resume`.

    accelerate launch --multi_gpu --num_processes 8 --module attnbench run images --data PATH --resume

A share of batch i is rows `rank B/W` to `(rank + 1) B/W - 1` of it, so that W processes see the same examples as one. Rounding differs, and
so does what is drawn for a batch as a whole: mixing of images, and stochastic depth.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, distributed, nn

from attnbench.errors import UserError
from attnbench.tasks import trained

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attnbench.case import Case
    from attnbench.tasks.trained import Batch, Split, TrainedTask

_WAIT, _WORK = timedelta(days=7), timedelta(minutes=30)
"""how long the others wait for process 0, which may be busy with what needs no others, and for each other while they train"""


def size() -> int:
    """Number of processes that were launched together; 1 for one that was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


@dataclass(frozen=True)
class Group:
    """What a trainer asks of the processes that train with it; alone, everything stays as it is."""

    rank: int = 0
    size: int = 1
    handle: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def why_eager(self) -> str:
        """Why steps are not captured in a CUDA graph; empty where they may be."""
        return "" if self.size == 1 else f"{self.size} processes train together"

    def share(self, task: TrainedTask, batch: int) -> TrainedTask:
        """The task as this process draws it: its rows of each batch. Raises `UserError` where they cannot be equally many."""
        if batch % self.size:
            raise UserError(f"batch = {batch} cannot be shared by {self.size} processes: give a multiple of {self.size}")
        return task if self.size == 1 else replace(task, batch=_Share(task, self.rank, self.size))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes."""
        if self.size == 1:
            return model
        place = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        return nn.parallel.DistributedDataParallel(model, device_ids=place, process_group=self.handle)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size > 1:
            x = x.clone()
            distributed.all_reduce(x, group=self.handle)
            x /= self.size
        return x

    def gather(self, x: Tensor) -> Tensor:
        """What all processes hold `[B/W, ...]`, in the order of the batch that they share: `[B, ...]`."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(parts, x.contiguous(), group=self.handle)
        return torch.cat(parts)


@dataclass(frozen=True)
class _Share:
    """Draws the rows of one process."""

    task: TrainedTask
    rank: int
    size: int

    def __call__(self, split: Split, index: int, size: int, n: int, seed: int) -> Batch:
        return self.task.batch(split, index * self.size + self.rank, size // self.size, n, seed)


_group = Group()


def current() -> Group:
    """The processes that train together now."""
    return _group


def begin(case: Case, device: str, folder: Path | None) -> None:
    """In process 0: have the others train the case too. Nothing where there are none.

    Raises `UserError` for a task that is drawn, whose training set lies on one device as a whole.
    """
    if size() > 1 and not trained.folder(case.data):
        raise UserError(f"{size()} processes train together only on what a folder holds, not on {case.data}: launch one, or --concurrent")
    if size() > 1 and rank() == 0:
        _tell(case, folder)
        _work_together(device)


def end() -> None:
    """In process 0, once its suite is done: let the others end. Nothing where there are none."""
    if size() > 1:
        _tell(None, None)
        leave()


def leave() -> None:
    """Let go of every group."""
    global _group  # noqa: PLW0603 (a process is in one group)
    _group = Group()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def depart() -> NoReturn:
    """End this process at once: threads of a group that still hold Python objects abort an interpreter that ends step by step."""
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def follow(device: str, plugins: Sequence[Path] = ()) -> None:
    """In the other processes: take part in every case that process 0 trains, until it says that it is done."""
    from attnbench.registry import add_plugins
    from attnbench.tasks.accuracy import run

    add_plugins(plugins)
    while True:
        message: list[Any] = [None, None]
        try:
            _meet()
            distributed.broadcast_object_list(message)
        except (RuntimeError, ValueError):  # its worker was replaced: meet the next
            leave()
            time.sleep(0.1)
            continue
        case, folder = message
        if case is None:
            return
        _work_together(device)
        with suppress(UserError):  # which process 0 meets too, and records
            run(case, device, folder)


def _tell(case: Case | None, folder: Path | None) -> None:
    _meet()
    distributed.broadcast_object_list([case, folder])


def _meet() -> None:
    """Join the others in a group of this name alone, whose messages need no GPU."""
    if distributed.is_initialized():
        return
    place = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500")) + 1
    first = rank() == 0
    patience = _WORK if first else _WAIT
    store = distributed.TCPStore(*place, size(), is_master=first, timeout=patience)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank(), world_size=size(), timeout=_WAIT)


def _work_together(device: str) -> None:
    """Make the group that trains, each process on a GPU of its own."""
    global _group  # noqa: PLW0603
    if _group.size > 1:
        return
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU of its own: launch {torch.cuda.device_count()} a machine")
        torch.cuda.set_device(local)
    handle = distributed.new_group(backend="nccl" if device == "cuda" else "gloo", timeout=_WORK)
    _group = Group(rank(), size(), handle)
