"""Tasks that a model is trained on: what each must say, and how its batches look."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from attnbench.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

Split = Literal["train", "validation", "test"]
NAMES = ("mqar", "listops", "pathfinder", "digits", "images")
"""Modules of this package that export a `TASK`; also `LEVELS`, where it has some by name, or `open_folder`, where it reads one."""


@dataclass(frozen=True)
class Batch:
    """Examples of one batch, on the CPU."""

    inputs: Tensor
    """`[B, N]` long, token ids; or `[B, N, F]` float, F numbers a token"""
    targets: Tensor
    """`[B]` long, a class an example; `[B, classes]` float, shares of them, where training mixes examples; or `[B, N]` long, a class a
    token, read where `mask` is set"""
    mask: Tensor
    """`[B, N]` bool: where targets are `[B, N]`, the positions that count; else the tokens that are no padding"""
    groups: Tensor
    """`[B]` or `[B, N]` long, for each class asked for: the slice that an example or a token belongs to, such as a number of pairs"""

    @property
    def digest(self) -> str:
        """Hash of the contents, the same on every machine."""
        h = hashlib.sha256()
        for x in (self.inputs, self.targets, self.mask, self.groups):
            h.update(f"{x.dtype}{tuple(x.shape)}".encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()[:16]


class Draw(Protocol):
    """Draws a batch: a pure function of its arguments, the same on every machine; splits share no example."""

    def __call__(self, split: Split, index: int, size: int, n: int, seed: int) -> Batch:
        """Batch number `index` of `size` examples of N tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """A task that a small transformer learns from its training split and is judged by on its test split."""

    name: str
    """the file name, or `NAME:LEVEL`"""
    title: str
    kind: Literal["sequence", "image", "pixels"]
    """`sequence` of token ids; `image`: a grid of patches; `pixels`: a grid of one token a pixel"""
    vocabulary: int
    """number of token ids; 0 where inputs are real numbers"""
    features: int = 0
    """F, numbers a token; 0 where inputs are token ids"""
    classes: int
    causal: bool | Literal["both"]
    """whether a token may read only itself and earlier ones to solve it; `both`: the same batches can be solved either way"""
    per_token: bool = False
    """whether targets are `[B, N]`: a class a token, rather than one an example"""
    alike: bool = False
    """of a class a token: whether every example counts the same in the loss, rather than every token"""
    grid: Callable[[int], tuple[int, int] | None]
    """N -> (height, width) of the tokens, row by row; None for a sequence. Raises `UserError` for N that is no such grid"""
    chance: float
    """accuracy of a guess"""
    lengths: tuple[int, ...]
    """N at which it is usually asked"""
    source: str
    """citation with URL, and departures from it"""
    batch: Draw
    group: str = "group"
    """what `Batch.groups` counts, such as `pairs`"""
    examples: int = 0
    """training examples there are, for a finite data set; 0 where they are drawn without end"""

    held_out: int = 0
    """examples of the validation split and of the test split, the smaller number, for a finite data set; 0 where they are drawn"""
    tested: int = 0
    """examples of the test split, where it is larger than `held_out`"""
    notes: Callable[[], list[str]] = list
    """what the data set has to say once it was read, such as files that are damaged"""

    @property
    def stem(self) -> str:
        """The name as part of the name of a file."""
        return self.name.replace(":", "-")

    def available(self, split: Split) -> int:
        """Examples of a held-out split that there are; 0 where they are drawn without end."""
        return max(self.tested, self.held_out) if split == "test" else self.held_out

    def forms(self) -> tuple[bool, ...]:
        """Values of `causal` that it can be asked with."""
        return (False, True) if self.causal == "both" else (bool(self.causal),)


def sequence(_n: int) -> None:
    """The grid of a task that has none."""
    return


def square(n: int) -> tuple[int, int]:
    """The grid of a square image. Raises `UserError` where N is no square."""
    side = round(n**0.5)
    if side * side != n:
        raise UserError(f"N = {n} is no square, which this task needs: set n to 1024 or 4096, say")
    return side, side


def get(name: str) -> TrainedTask:
    """The task `name`, `name:LEVEL` where it has levels, or `name:PATH` where it reads a folder. Raises `UserError`."""
    name, module, word = _parted(name)
    levels: Mapping[str, TrainedTask] = getattr(module, "LEVELS", {})
    if word in levels:
        return levels[word]
    if word and levels:
        raise unknown(f"level of {name}", word, levels)
    if word and not hasattr(module, "open_folder"):
        raise UserError(f"task {name} reads no folder and has no levels: leave out {word}")
    task: TrainedTask = module.open_folder(word).task if word else module.TASK
    return task


def folder(name: str) -> str:
    """The PATH of `name:PATH`, which is not looked into; empty for a task that is drawn. Raises `UserError` for an unknown task."""
    _, module, word = _parted(name)
    return word if hasattr(module, "open_folder") else ""


def by_name(task: TrainedTask) -> bool:
    """Whether its name is enough for another process to get this very task."""
    return task.name.partition(":")[0] in NAMES and get(task.name) is task


def _parted(text: str) -> tuple[str, Any, str]:
    """`NAME` or `NAME:WORD` -> the name, its module, which is imported now, and the word. Raises `UserError`."""
    name, _, word = text.partition(":")
    if name not in NAMES:
        raise unknown("trained task", name, NAMES)
    return name, import_module(f"attnbench.tasks.{name}"), word
