"""Long ListOps: the value of nested lists of digits under minimum, maximum, median and sum modulo 10.

        [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]      answer: 5

The grammar of Long Range Arena: an argument is an operator with probability 1/4 and else a digit; operators have 2 to 10 arguments and lie
at most 9 deep below digits at depth 10; the median of an even number of arguments is the mean of the two middle ones, rounded down. Trees
are drawn until their tokens are more than a quarter of L and fewer than L, L = min(N, 2000): at N = 2048 that is 500 to 2000, as
published; shorter N scale it. Tokens: 0 pads at the end, 1 to 10 are digits, then the operators and `]`. `group` is the number of tokens,
rounded down to eighths of L. Classes are as likely as the grammar makes them: 0 and 9 about 0.17 each, the others 0.07 to 0.09.
Tay et al. 2021, https://arxiv.org/abs/2011.04006; Nangia and Bowman 2018, https://arxiv.org/abs/1804.06028.

Departures: none in the grammar. Brackets of the binary tree are left out, as their tokeniser does, and examples are drawn without end.

A tree grows level by level, all trees of a batch at once; the level of all trees below an operator holds its arguments side by side, so
values rise and places descend by sums over segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnbench.errors import UserError
from attnbench.tasks._draw import generator
from attnbench.tasks.trained import Batch, TrainedTask, sequence

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

TOKENS = (*"_0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""token id -> text; `_` pads"""
DEPTH, ARGUMENTS, LONGEST = 10, 10, 2000
OPERATOR_SHARE = 0.25
_DIGIT, _OPERATOR, _CLOSE = 1, 11, 15
_SHORTEST_N = 32


@dataclass
class _Level:
    """Nodes of one depth, trees one after the other, siblings side by side."""

    tree: np.ndarray
    """`[X]` tree of a node"""
    parent: np.ndarray
    """`[X]` its parent's place in the level above"""
    symbol: np.ndarray
    """`[X]` a digit, or 10 + operator"""
    arguments: np.ndarray
    """`[X]` number of children; 0 for digits"""
    value: np.ndarray
    length: np.ndarray
    """`[X]` tokens of the subtree"""


def batch(split: Split, index: int, size: int, n: int, seed: int) -> Batch:
    """Trees of less than min(N, 2000) tokens, padded to N, and their values. Raises `UserError` for N below 32."""
    if n < _SHORTEST_N:
        raise UserError(f"listops needs N of at least {_SHORTEST_N}, not {n}: set n to 2048, as published")
    rng = generator("listops", split, index, size, n, seed)
    tokens, values = np.zeros((0, n), np.int64), np.zeros(0, np.int64)
    while len(tokens) < size:
        drawn = _trees(rng, 4 * size, n)
        tokens, values = (np.concatenate(pair)[:size] for pair in zip((tokens, values), drawn, strict=True))
    inputs = torch.from_numpy(tokens)
    mask, eighth = inputs > 0, min(n, LONGEST) // 8
    return Batch(inputs, torch.from_numpy(values), mask, torch.from_numpy(np.count_nonzero(tokens, 1) // eighth * eighth))


def _trees(rng: np.random.Generator, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of `count` drawn trees that have an allowed number of tokens: tokens `[B, N]` and values `[B]`."""
    longest = min(n, LONGEST)
    levels = _grow(rng, count, longest)
    for upper, lower in zip(levels[-2::-1], levels[:0:-1], strict=True):
        _raise(upper, lower)
    length = levels[0].length
    fits = (length > longest // 4) & (length < longest)
    return _written(levels, fits, n), levels[0].value[fits]


def _grow(rng: np.random.Generator, count: int, longest: int) -> list[_Level]:
    """Levels of `count` trees from the root down; a tree that is too long already grows no further."""
    tokens = np.zeros(count, np.int64)
    tree, parent = np.arange(count), np.zeros(count, np.int64)
    levels = []
    for depth in range(1, DEPTH + 1):
        operator = (rng.random(len(tree)) < OPERATOR_SHARE) | (depth == 1)
        symbol = np.where(operator & (depth < DEPTH), 10 + rng.integers(0, 4, len(tree)), rng.integers(0, 10, len(tree)))
        tokens += np.bincount(tree[symbol >= 10], minlength=count) + np.bincount(tree, minlength=count)
        drawn = rng.integers(2, ARGUMENTS + 1, len(tree))
        arguments = np.where((symbol >= 10) & (tokens[tree] < longest), drawn, 0)
        levels.append(_Level(tree, parent, symbol, arguments, symbol.copy(), np.where(symbol >= 10, 2, 1)))
        tree, parent = np.repeat(tree, arguments), np.repeat(np.arange(len(tree)), arguments)
        if not len(tree):
            break
    overlong = tokens >= longest
    levels[0].length[overlong] = longest
    return levels


def _raise(upper: _Level, lower: _Level) -> None:
    """Values and lengths of the operators of a level from their arguments, which lie side by side in the level below."""
    where = np.flatnonzero(upper.arguments)
    count = upper.arguments[where]
    first = count.cumsum() - count
    ordered = np.sort(16 * lower.parent + lower.value) & 15  # siblings stay together
    middle = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
    total = np.add.reduceat(lower.value, first)
    results = np.stack([ordered[first], ordered[first + count - 1], middle, total % 10])
    upper.value[where] = results[upper.symbol[where] - 10, np.arange(len(where))]
    upper.length[where] += np.add.reduceat(lower.length, first)


def _written(levels: list[_Level], fits: np.ndarray, n: int) -> np.ndarray:
    """Tokens `[B, N]` of the trees that fit, in reading order."""
    row = np.where(fits, fits.cumsum() - 1, -1)
    tokens = np.zeros((int(fits.sum()), n), np.int64)
    start = np.zeros(len(fits), np.int64)
    for depth, level in enumerate(levels):
        if depth:
            before, families = level.length.cumsum() - level.length, levels[depth - 1].arguments
            eldest = (families.cumsum() - families)[level.parent]
            start = start[level.parent] + 1 + before - before[eldest]
        here = fits[level.tree]
        of, at, symbol = row[level.tree[here]], start[here], level.symbol[here]
        tokens[of, at] = np.where(symbol < 10, _DIGIT + symbol, _OPERATOR + symbol - 10)
        closed = symbol >= 10
        tokens[of[closed], (at + level.length[here] - 1)[closed]] = _CLOSE
    return tokens


TASK = TrainedTask(
    name="listops",
    title="Long ListOps",
    kind="sequence",
    vocabulary=len(TOKENS),
    classes=10,
    causal=False,
    grid=sequence,
    chance=0.1,
    lengths=(2048,),
    source="Tay et al. 2021, Long Range Arena, https://arxiv.org/abs/2011.04006; generated by its grammar without end",
    batch=batch,
    group="tokens",
)
