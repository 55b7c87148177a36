"""What of a cost model can be held without a machine: against the method's own fast weights, and against itself.

Held are:

- stages: whole FLOPs and traffic of at least 0, under names of `attnbench/stages.py` or names that such a stage covers; all add up to the
  total, which is above 0;
- reading: a query that reads W hidden units scores and sums them, `2 (W - 1) (D + Dv)` FLOP, counted in the fast weights at a small size
  (W - 1, since one unit alone needs neither; weights that are zero are left out). Linear units fold into as many rows as their keys have
  entries, and are only summed. The sums must be in `attend`, `read` or `other`, the scores in no stage that only builds experts;
- bytes: at least the queries and the output once;
- batch: for twice the batch a stage does twice the work, or no more than that where it is `project`, which may fold learned maps once;
- size: for twice the heads and four times the tokens every stage does more;
- growth: FLOPs and bytes grow as N to a power from 1 to 2, defaults fitted to each length.

Not held is how much building and choosing experts costs (pooling, landmarks, scores that only select), nor that more is not counted than
is done, nor the split of memory traffic over stages: these need the method's formula, or a machine.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from attnbench.inputs import draw
from attnbench.params import Shape
from attnbench.stages import STAGES, home, known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from attnbench.cost import Cost
    from attnbench.fastweights import Bank, FastWeights
    from attnbench.method import Method, Params

_LENGTHS = (1 << 14, 1 << 16, 1 << 18)
"""Squares, long enough that a method with fixed parameters grows as it does at the end."""
_SIZE = 4
"""bytes of an element, wherever bytes are asked for"""
_SUMMING = ("attend", "read", "other")
_BUILDING = ("project", "pool", "state", "probe", "compress", "invert", "select")


def problems(method: Method, shape: Shape, params: Params) -> list[str]:
    """What cannot be right about the cost of such a call; empty where nothing is."""
    cost = method.cost(shape, params)
    malformed = _malformed(cost)
    if malformed:  # the numbers mean nothing
        return malformed
    own = (method, cost, shape, params)
    return [*_reading(*own), *_bytes(cost, shape), *_batch(*own), *_size(*own), *_growth(method, params)]


def least(weights: FastWeights, q: Tensor) -> tuple[float, float]:
    """FLOP that the queries `q: [B, H, N, D]` need to score hidden units, and to sum them."""
    parts = [_work(bank, rows) for bank in weights.banks for rows in torch.arange(q.shape[2]).split(64)]
    return sum(score for score, _ in parts), sum(mix for _, mix in parts)


def _work(bank: Bank, rows: Tensor) -> tuple[float, float]:
    w1, w2, tokens = bank.units(rows)
    absent = tokens == -1
    if bank.causal:
        absent = absent | (bank.latest(rows) > rows[:, None])
    times = len(rows) / absent.shape[2]
    if bank.activation == "linear":
        return 0.0, times * _multiplications(w2, absent, w1.shape[-1])
    return times * _multiplications(w1, absent), times * _multiplications(w2, absent)


def _multiplications(w: Tensor, absent: Tensor, most: int = 0) -> float:
    """2 FLOP an entry of `w: [B, H, R or 1, U, D]` that is not zero: of all units but one that are not absent, or of `most` of them."""
    units = (~absent).sum(-1)
    entries = (w != 0).sum(-1).masked_fill(absent, 0).sum(-1)
    read = (units.clamp(max=most) if most else units) - 1
    return 2.0 * float((entries * read.clamp(min=0) / units.clamp(min=1)).sum())


def _malformed(cost: Cost) -> list[str]:
    found = []
    for stage, work in cost.by_stage(_SIZE).items():
        if not known(stage) and home(stage, STAGES) == "other":
            found.append(f"{stage!r} is no stage: choose from {', '.join(STAGES)}")
        found += [
            f"stage {stage!r} counts {value!r} {what}: give whole numbers of at least 0"
            for what, value in (("FLOPs", work.flops), ("bytes", work.bytes))
            if not isinstance(value, int) or value < 0
        ]
    found += [f"selection names {stage!r}, which is no stage" for stage in cost.selection if not known(stage)]
    if not found and sum(work.flops for work in cost.by_stage(_SIZE).values()) != cost.total():
        found.append(f"stages add up to {sum(work.flops for work in cost.by_stage(_SIZE).values())} FLOPs, not {cost.total()}")
    if not isinstance(cost.elements, int) or not isinstance(cost.index_bytes, int) or cost.index_bytes < 0:
        found.append(f"{cost.elements!r} elements and {cost.index_bytes!r} bytes of indices: give whole numbers of at least 0")
    return found or ([] if cost.total() > 0 else ["no FLOPs are counted"])


def _reading(method: Method, cost: Cost, shape: Shape, params: Params) -> Iterator[str]:
    if method.experts is None:
        return
    inputs = draw("randn", shape, 0, torch.float64, "cpu")
    score, mix = least(method.experts(*inputs, params), inputs[0])
    counted = sum(flops for stage, flops in cost.flops.items() if stage in _SUMMING)
    if counted < mix:
        yield f"attend: {counted} FLOPs, fewer than {mix:.0f}, which summing the hidden units takes that a query reads"
    reading = {stage: flops for stage, flops in cost.flops.items() if stage not in _BUILDING}
    if sum(reading.values()) < score + mix:
        names = " + ".join(reading) or "attend"
        yield f"{names}: {sum(reading.values())} FLOPs, fewer than {score + mix:.0f}, which scoring and summing them takes"


def _bytes(cost: Cost, shape: Shape) -> Iterator[str]:
    lowest = shape.batch * shape.heads * shape.n * (shape.dim + shape.dim_v) * _SIZE
    if cost.bytes(_SIZE) < lowest:
        yield f"{cost.bytes(_SIZE)} bytes, fewer than {lowest}, which the queries and the output have"


def _batch(method: Method, cost: Cost, shape: Shape, params: Params) -> Iterator[str]:
    twice = method.cost(replace(shape, batch=2 * shape.batch), params)
    for stage, flops in cost.flops.items():
        more = twice.flops.get(stage, 0)
        if more > 2 * flops or (more < 2 * flops and stage != "project"):
            yield f"stage {stage!r}: {flops} FLOPs, and {more} for twice the batch"
    if not cost.bytes(_SIZE) < twice.bytes(_SIZE) <= 2 * cost.bytes(_SIZE):
        yield f"{cost.bytes(_SIZE)} bytes, and {twice.bytes(_SIZE)} for twice the batch"


def _size(method: Method, cost: Cost, shape: Shape, params: Params) -> Iterator[str]:
    larger = replace(shape, heads=2 * shape.heads, kv_heads=2 * shape.kv_heads, n=4 * shape.n, keys=4 * shape.keys)
    if params.problems(larger):
        return
    flops = method.cost(larger, params).flops
    for stage, own in cost.flops.items():
        if own and flops.get(stage, 0) <= own:
            yield f"stage {stage!r}: {own} FLOPs, and {flops.get(stage, 0)} for twice the heads and four times the tokens"


def _growth(method: Method, params: Params) -> Iterator[str]:
    """The power of N is that of the increments, which a part that is the same at every length leaves alone."""
    shapes = [Shape(1, 2, n, 16) for n in _LENGTHS]
    settings = [params.fitted(shape) for shape in shapes]
    if any(setting.problems(shape) for shape, setting in zip(shapes, settings, strict=True)):
        return
    costs = [method.cost(shape, setting) for shape, setting in zip(shapes, settings, strict=True)]
    for what, (a, b, c) in {"FLOPs": [x.total() for x in costs], "bytes": [x.bytes(_SIZE) for x in costs]}.items():
        if not a < b < c:
            yield f"{what} do not grow with N: {a}, {b}, {c} at N = {', '.join(map(str, _LENGTHS))}"
        elif not 1 <= (power := round(math.log((c - b) / (b - a), _LENGTHS[1] / _LENGTHS[0]), 2)) <= 2:
            yield f"{what} grow as N^{power:g}, not between N and N^2"
