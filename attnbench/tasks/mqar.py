"""Multi-query associative recall: key-value pairs first, then their keys again at power-law distances, each to be answered by its value.

An example of N tokens starts with P pairs `k_1 v_1 ... k_P v_P`. After them each key is asked once: it stands at token `2 P + 2 g`, with
gaps g drawn without replacement with probabilities `(g + 1)^(a - 1)`, a = 0.01. All else is the mask.

        A 4 B 3 C 6 | _ _ B _ _ _ A _ ...      answers: B -> 3, A -> 4

Causal and bidirectional methods get the same batches: the answer is read at the asked key, and what follows it is masked, so that neither
can see it. Keys come from the first half of the vocabulary, values from the second; token 0 is the mask.

Difficulty, from Zoology: vocabulary 8192, and at N = 256 between 4 and 64 pairs. Pairs grow with N: N/64, N/32, N/16, N/8, N/4, each as
often as the others. `group` is the number of pairs. Arora et al. 2023, https://arxiv.org/abs/2312.04927; empty places as in the
configurations of their figure 2 (`random_non_queries=False`), https://github.com/HazyResearch/zoology.

`mqar:graded` asks for N/4 pairs, half of them, a quarter, ... down to 4, and every example counts the same in its loss, so that few pairs
teach what many then need: in the configurations of figure 2 of Arora et al. 2024, https://arxiv.org/abs/2402.18668, 100 000 of 180 000
examples have 4 pairs and the others 8 to 64.

The suites put a convolution of width 3 in front of the blocks (`short_conv`), as every model of that figure has one as its first layer:
values then know their keys, and a method is asked for recall alone.

Departures: numbers of pairs are mixed in training, theirs trains on N/16 pairs alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench.errors import UserError
from attnbench.tasks._draw import generator
from attnbench.tasks.trained import Batch, TrainedTask, sequence

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

VOCABULARY = 8192
MASK = 0
POWER = 0.01
"""a of the power law of gaps"""
_KEYS = VOCABULARY // 2
_SHARES = 64, 32, 16, 8, 4
"""N over numbers of pairs"""
_FEWEST = 4
"""pairs of the easiest example of `mqar:graded`, at least"""


def pairs(n: int) -> tuple[int, ...]:
    """Numbers of pairs asked at N. Raises `UserError` where N is odd, below 4 or above what the vocabulary holds."""
    if n % 2 or not 4 <= n <= VOCABULARY:
        raise UserError(f"mqar needs an even N from 4 to {VOCABULARY}, not {n}: set n to 256, 1024 or 4096, say")
    return tuple(sorted({max(1, n // share) for share in _SHARES}))


def graded(n: int) -> tuple[int, ...]:
    """Numbers of pairs: the most that are asked at N, and halves of it down to 4. Raises `UserError` as `pairs` does."""
    most = pairs(n)[-1]
    return tuple(sorted({most >> i for i in range(most.bit_length()) if most >> i >= min(_FEWEST, most)}))


def batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Examples with each number of pairs in turn; targets are tokens, asked where `mask` is set."""
    return _batch(generator("mqar", split, index, size, n, seed), pairs(n), index, size, n)


def graded_batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """The same with numbers of pairs as `graded` has them."""
    return _batch(generator("mqar graded", split, index, size, n, seed), graded(n), index, size, n)


def _batch(rng: np.random.Generator, choices: tuple[int, ...], index: int, size: int, n: int) -> Batch:
    count = np.array(choices)[(index * size + np.arange(size)) % len(choices)][:, None]
    most = choices[-1]
    ranks = np.arange(most)[None]
    used = ranks < count
    keys = rng.random((size, _KEYS - 1)).argsort(1)[:, :most] + 1
    values = rng.random((size, _KEYS)).argsort(1)[:, :most] + _KEYS
    tokens = np.full((size, n), MASK, np.int64)
    row = np.broadcast_to(np.arange(size)[:, None], used.shape)[used]
    place = np.broadcast_to(2 * ranks, used.shape)[used]
    asked = (2 * count + 2 * _gaps(rng, count, n, most))[used]
    tokens[row, place], tokens[row, place + 1] = keys[used], values[used]
    tokens[row, asked] = keys[used]
    targets, mask = np.zeros((size, n), np.int64), np.zeros((size, n), bool)
    targets[row, asked], mask[row, asked] = values[used], True
    groups = torch.from_numpy(count.astype(np.int64)).repeat(1, n)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(mask), groups)


def _gaps(rng: np.random.Generator, count: np.ndarray, n: int, most: int) -> np.ndarray:
    """Different gaps `[B, most]`, the first `count` of a row drawn in turn with the power law: the smallest of exponential clocks."""
    space = np.arange(n // 2)
    clocks = -np.log1p(-rng.random((len(count), len(space)))) / (space + 1) ** (POWER - 1)
    clocks[space[None] >= n // 2 - count] = np.inf
    first: np.ndarray = clocks.argsort(1)[:, :most]
    return first


TASK = TrainedTask(
    name="mqar",
    title="Multi-query associative recall",
    kind="sequence",
    vocabulary=VOCABULARY,
    classes=VOCABULARY,
    causal="both",
    per_token=True,
    grid=sequence,
    chance=1 / _KEYS,
    lengths=(256, 1024, 4096),
    source="Arora et al. 2023, Zoology, https://arxiv.org/abs/2312.04927; numbers of pairs are mixed",
    batch=batch,
    group="pairs",
)

LEVELS = {"graded": replace(TASK, name="mqar:graded", title=f"{TASK.title}, graded", batch=graded_batch, alike=True)}
