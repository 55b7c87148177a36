"""Seeded randomness of the tasks that are generated."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split


def generator(task: str, split: Split, *key: int) -> np.random.Generator:
    """A generator that depends on the task, the split and the numbers of `key`, and on nothing else.

    The seed is a hash of them, so that neighbouring batches and seeds, and the splits, share no stream.
    """
    text = "/".join([task, split, *map(str, key)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "little"))
