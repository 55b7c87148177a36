"""Models that train side by side: the learning rates of one case, which share their batches and, on a GPU, the time of its cores.

After a share of the steps (`Recipe.rung`) only the one with the smallest loss on the validation split goes on, as in successive halving:
Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943. But as long as none does better than a guess there is nothing to choose by:
then all go on to the next evaluation. The race ends at the first evaluation at which one reaches the target, or else after the last step.
Whether rates run at once or one after another, and how often they were killed in between, changes nothing: as far as a step gives the same
bits, as on the CPU, recipe and task alone determine how far each goes and which wins.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.recipe import Fit, Recipe
    from attnbench.tasks.trained import TrainedTask
    from attnbench.train import Trainer

_MOST, _SHORT_S, _LONG_S = 64, 0.2, 1.0
"""steps that are queued on a GPU before the host waits for it: more where they take less time than this, fewer where more"""


class Field(Protocol):
    """Models whose recipes differ in the rate alone, however they share the device."""

    recipe: Recipe
    """of one of them"""
    task: TrainedTask

    @property
    def fits(self) -> Sequence[Fit]:
        """What each left behind so far; known once they ran."""

    @property
    def size(self) -> int:
        """How many they are."""

    def together(self, end: int) -> int:
        """All of them up to a step, or to the one at which the first reaches the target, which is returned."""

    def alone(self, number: int, end: int) -> int:
        """One of them likewise."""


class Ended(NamedTuple):
    """How a race ended."""

    step: int
    fits: list[Fit]
    """as they are judged: where all ran to the end, without what one that was ahead did after it"""


def run(field: Field, end: int | None = None) -> Ended:
    """The race, up to the step at which the first is done; at most to `end`."""
    recipe = field.recipe
    end = recipe.steps if end is None else end
    reached = field.together(min(end, recipe.cut) if field.size > 1 else end)
    while not (over := reached >= end or any(fit.upto(reached).reached >= recipe.target for fit in field.fits)):
        if any(learned(fit, recipe, field.task, reached) for fit in field.fits):
            break
        reached = field.together(min(end, reached + recipe.interval))
    if over:
        return Ended(reached, [fit.upto(reached) for fit in field.fits])
    for number in ranked(field.fits, reached):  # where the best stops being finite, the next best goes on
        reached = field.alone(number, end)
        if not field.fits[number].diverged:
            return Ended(reached, list(field.fits))
    return Ended(end, list(field.fits))


def race(trainers: Sequence[Trainer], end: int | None = None) -> Ended:
    """The race of models that are on the device side by side. Those that went on from checkpoints of different ages wait for each other."""
    ended = run(_SideBySide(trainers), end)
    for trainer in trainers:
        trainer.finish()
    return ended


class _SideBySide:
    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers, self.size = trainers, len(trainers)
        self.recipe, self.task = trainers[0].recipe, trainers[0].task

    @property
    def fits(self) -> list[Fit]:
        return [t.fit for t in self.trainers]

    def together(self, end: int) -> int:
        return _together(self.trainers, end)

    def alone(self, number: int, end: int) -> int:
        return _together([self.trainers[number]], end)


def learned(fit: Fit, recipe: Recipe, task: TrainedTask, step: int) -> bool:
    """Whether its accuracy on the validation split is above that of a guess, or of one answer to all, by more than chance explains.

    That is by `Recipe.errors` standard errors of an accuracy that is read off as many answers as there are examples.
    """
    available = task.available("validation")
    examples = min(recipe.batches("validation", available) * recipe.batch, available or math.inf)
    guess = max(task.chance, fit.constant)
    return fit.accuracy_at(step) > guess + recipe.errors * math.sqrt(guess * (1 - guess) / examples)


def ranked(fits: Sequence[Fit], step: int) -> list[int]:
    """Their numbers, those that do best at a step first: the smallest loss on the validation split, of several the first."""
    return sorted(range(len(fits)), key=lambda i: fits[i].loss_at(step))


def _together(trainers: Sequence[Trainer], end: int) -> int:
    """All of them up to `end`, or to the step at which the first reaches the target, which is returned."""
    while True:
        end = min([end, *(t.fit.step for t in trainers if t.fit.reached >= t.recipe.target)])
        running = [t for t in trainers if not t.over and t.fit.step < end]
        if not running:
            return end
        last = min(t.fit.step for t in running)
        ahead = [t.fit.step for t in running if t.fit.step > last]
        _run([t for t in running if t.fit.step == last], min([end, *ahead]))


def _run(group: Sequence[Trainer], until: int) -> None:
    """Models at the same step, up to a step or to the first that is over."""
    first, size, begun = group[0], 4, 0.0
    for trainer in group:
        trainer.model.train()
    with first.batches.batches(first.fit.step) as batches:
        while first.fit.step < until and not any(t.over for t in group):
            steps = min(until, _stop(first, size)) - first.fit.step
            queued = time.perf_counter()
            for _ in range(steps):
                batch = next(batches)
                for trainer in group:
                    trainer.take(batch)
            for trainer in group:
                trainer.wait()
            now = time.perf_counter()
            for trainer in group if begun else ():
                trainer.fit.seconds, trainer.fit.timed = trainer.fit.seconds + now - begun, trainer.fit.timed + steps
            size = _next_size(size, now - queued)
            for trainer in group:
                trainer.look()
            begun = time.perf_counter() if all(t.settled for t in group) else 0.0


def _stop(trainer: Trainer, size: int) -> int:
    """The next step at which to look: on a CPU, which queues nothing, after each."""
    step, r = trainer.fit.step, trainer.recipe
    if trainer.device == "cpu":
        return step + 1
    return min(step + size, *(step - step % every + every for every in (r.points, r.interval)))


def _next_size(size: int, seconds: float) -> int:
    if seconds > _LONG_S:
        return max(1, size // 2)
    return min(_MOST, 2 * size) if seconds < _SHORT_S else size
