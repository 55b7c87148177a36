"""Images: any folder of images in class sub-folders, as patches of 16 x 16, with DeiT's augmentation and mixing.

`PATH/train/CLASS/*` and `PATH/val/CLASS/*`, as ImageNet lies: `val` is the test split and every 50th image of `train`, by the hash of its
name, is held out for validation. `PATH/CLASS/*`: by the hash of its name, an image is in the test split (1 in 10), in validation (1 in 10)
or in training. N patches make images of 16 sqrt(N) pixels a side: N = 196 is 224 x 224, N = 576 384 x 384, N = 1024 512 x 512.

Training goes through the images in a new random order every epoch, each three times in a row and each time augmented anew; so three epochs
of a batch count see a third of them each (Hoffer et al. 2020, https://arxiv.org/abs/1901.09335). Then a batch is mixed: see `_mix.py`.

Files are decoded when they are read, by as many threads as there are cores: Pillow lets others run while it decodes and scales. What cannot
be decoded is skipped, the next image of the order stands in for it, and `Folder.skipped` names it. Touvron et al. 2021,
https://arxiv.org/abs/2012.12877; for departures see `_augment.py`.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench.errors import UserError
from attnbench.tasks._draw import generator
from attnbench.tasks._mix import mixed
from attnbench.tasks.trained import Batch, TrainedTask, square

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

    from attnbench.tasks.trained import Split

PATCH = 16
"""pixels of a patch, a side"""
DEIT_TINY = {"dim": 192, "heads": 3, "depth": 12, "class_token": True, "positions": "learned", "qkv_bias": True}
"""Geometry of DeiT-Tiny, as arguments of `attnbench.nn.Architecture`; 224 x 224 pixels are N = 196. DeiT-S is twice as wide."""
REPEATS = 3
"""times that an image of the training order comes in a row"""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_TEST_FOLDERS = "val", "validation", "test"
_HELD_OUT, _TENTHS = 50, 10
_NAMED = 3


@dataclass(frozen=True)
class Folder:
    """Names of the images of each split and their classes; `batch` reads them."""

    path: Path
    classes: tuple[str, ...]
    files: dict[Split, list[tuple[str, int]]]
    """split -> (name below `path`, class)"""
    unreadable: dict[Split, torch.Tensor] = field(default_factory=dict)
    """split -> `[files]` bool"""

    @property
    def skipped(self) -> list[str]:
        """Names of the images met so far that could not be decoded."""
        return [name for split, marks in self.unreadable.items() for (name, _), bad in zip(self.files[split], marks, strict=True) if bad]

    @cached_property
    def task(self) -> TrainedTask:
        """The task of this folder."""
        count = {split: len(files) for split, files in self.files.items()}
        return replace(
            TASK,
            classes=len(self.classes),
            chance=1 / len(self.classes),
            batch=self.batch,
            examples=count["train"],
            held_out=min(count["validation"], count["test"]),
            tested=count["test"],
            notes=self._notes,
        )

    def _notes(self) -> list[str]:
        bad = self.skipped
        named = ", ".join(bad[:_NAMED] + ["..."] * (len(bad) > _NAMED))
        return [f"skipped {len(bad)} images that cannot be decoded: {named}"] if bad else []

    def batch(self, split: Split, index: int, size: int, n: int, seed: int) -> Batch:
        """Patches `[B, N, 3 x 16 x 16]`, each channel by channel and row by row; for training mixed, with shares of the classes.

        Raises `UserError` where no image can be decoded.
        """
        side = square(n)[0] * PATCH
        numbers = range(index * size, (index + 1) * size)
        read = list(_pool(os.getpid()).map(lambda number: self._example(split, number, side, seed), numbers))
        classes = targets = torch.tensor([label for _, label in read])
        whole = torch.stack([torch.from_numpy(image) for image, _ in read])
        if split == "train":
            whole, targets = mixed(whole, classes, len(self.classes), generator("images/mix", split, seed, index, size))
        return Batch(patches(whole), targets, torch.ones(size, n, dtype=torch.bool), classes)

    def _example(self, split: Split, number: int, side: int, seed: int) -> tuple[np.ndarray, int]:
        """Image `[3, S, S]` and class at a place of the endless order: shuffled anew every epoch for training, else as it is."""
        from attnbench.tasks import _augment

        files, marks = self.files[split], self.unreadable[split]
        epoch, place = divmod(number // REPEATS if split == "train" else number, len(files))
        order = _shuffled(len(files), seed, epoch) if split == "train" else np.arange(len(files))
        for at in (int(order[(place + step) % len(files)]) for step in range(len(files))):
            image = decoded(self.path / files[at][0])
            if image is None:
                marks[at] = True
                continue
            if split == "train":
                return _augment.for_training(image, side, generator("images/augment", split, seed, number)), files[at][1]
            return _augment.for_evaluation(image, side), files[at][1]
        raise UserError(f"none of the {len(files)} images of the {split} split of {self.path} can be decoded: check the files")


def open_folder(path: str | Path) -> Folder:
    """Images below a folder. Raises `UserError` where it does not exist or holds no classes or too few images."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one that holds a folder of images for each class")
    given = next((name for name in _TEST_FOLDERS if (path / name).is_dir() and (path / "train").is_dir()), None)
    names = _classes(path / "train" if given else path)
    files: dict[Split, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(names):
        for image in below(path / "train" / name if given else path / name):
            short = image.relative_to(path).as_posix()
            files[_split(short, given is not None)].append((short, label))
        if given:
            files["test"] += [(image.relative_to(path).as_posix(), label) for image in below(path / given / name)]
    if empty := [split for split, images in files.items() if not images]:
        raise UserError(f"{path} has no images for {' and '.join(empty)}: it needs more of them, ending in {', '.join(SUFFIXES)}")
    return Folder(path, names, files, {split: torch.zeros(len(x), dtype=torch.bool) for split, x in files.items()})


def patches(image: torch.Tensor) -> torch.Tensor:
    """`[.., C, S, S]` -> `[.., N, C x P x P]`, patches row by row, in the order of the weights of a convolution."""
    cut = image.unfold(-2, PATCH, PATCH).unfold(-2, PATCH, PATCH)  # [.., C, rows, columns, P, P]
    return cut.movedim(-5, -3).flatten(-3).flatten(-3, -2)


@lru_cache(maxsize=1)
def _pool(_process: int) -> ThreadPoolExecutor:
    """Threads that read images; of this process, since those of its parent are not."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="images")


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator("images", "train", seed, epoch).permutation(count)


def _classes(path: Path) -> tuple[str, ...]:
    names = tuple(sorted(x.name for x in path.iterdir() if x.is_dir() and not x.name.startswith(".")))
    if len(names) < 2:
        have = f"one folder, {names[0]}" if names else "no folders"
        raise UserError(f"{path} has no classes but {have}: put the images of each class into a folder of its own")
    return names


def below(path: Path) -> Iterable[Path]:
    """Files below a folder that are images by their names, in order; none where it does not exist."""
    found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    return sorted(x for x in found if x.suffix.lower() in SUFFIXES)


def _split(name: str, given: bool) -> Split:
    """Split of an image by the hash of its name, where `given` says that the test split has a folder of its own."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    if given:
        return "validation" if number % _HELD_OUT == 0 else "train"
    return ("test", "validation", "train")[min(number % _TENTHS, 2)]


def decoded(path: Path) -> Image.Image | None:
    """An RGB image, or None where the file is unreadable, truncated or no image."""
    from PIL.Image import DecompressionBombError
    from PIL.Image import open as opened

    try:
        with opened(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, DecompressionBombError):
        return None


def _no_folder(*_: object, **__: object) -> Batch:
    raise UserError("task images needs a folder of images in class sub-folders: give it with --data PATH")


TASK = TrainedTask(
    name="images",
    title="Image classification",
    kind="image",
    vocabulary=0,
    features=3 * PATCH**2,
    classes=1000,
    causal=False,
    grid=square,
    chance=1 / 1000,
    lengths=(196, 576, 1024),
    source="Touvron et al. 2021, DeiT, https://arxiv.org/abs/2012.12877; without colour jitter",
    batch=_no_folder,
    group="class",
)
"""Without a folder, and with ImageNet-1K's number of classes; `open_folder(PATH).task` is the task of a folder."""
