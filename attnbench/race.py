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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.recipe import Fit, Recipe
    from attnbench.tasks.trained import TrainedTask
    from attnbench.train import Trainer

_MOST, _SHORT_S, _LONG_S = 64, 0.2, 1.0
"""steps that are queued on a GPU before the host waits for it: more where they take less time than this, fewer where more"""


def race(trainers: Sequence[Trainer], end: int | None = None) -> int:
    """Train models whose recipes differ in the rate alone, up to the step at which the first is done; at most to `end`.

    Returns the step at which the race ended: those that ran before know only then how far they should have gone (`Fit.upto`). Models that
    went on from checkpoints of different ages wait for each other.
    """
    recipe = trainers[0].recipe
    end = recipe.steps if end is None else end
    reached = _together(trainers, min(end, recipe.cut) if len(trainers) > 1 else end)
    while reached < end and not any(t.fit.upto(reached).reached >= recipe.target for t in trainers):
        if _learned(trainers, reached):
            reached = _alone(trainers, reached, end)
            break
        reached = _together(trainers, min(end, reached + recipe.interval))
    for trainer in trainers:
        trainer.finish()
    return reached


def cut(trainers: Sequence[Trainer]) -> int:
    """The step after which only the best of them went on; that of the end where all did."""
    recipe = trainers[0].recipe
    later = range(recipe.cut, recipe.steps, recipe.interval)
    return next((step for step in later if _learned(trainers, step)), recipe.steps)


def learned(fit: Fit, recipe: Recipe, task: TrainedTask, step: int) -> bool:
    """Whether its accuracy on the validation split is above that of a guess, or of one answer to all, by more than chance explains.

    That is by `Recipe.errors` standard errors of an accuracy that is read off as many answers as there are examples.
    """
    available = task.available("validation")
    examples = min(recipe.batches("validation", available) * recipe.batch, available or math.inf)
    guess = max(task.chance, fit.constant)
    return fit.accuracy_at(step) > guess + recipe.errors * math.sqrt(guess * (1 - guess) / examples)


def _learned(trainers: Sequence[Trainer], step: int) -> bool:
    return any(learned(t.fit, t.recipe, t.task, step) for t in trainers)


def ranked(fits: Sequence[Fit], step: int) -> list[int]:
    """Their numbers, those that do best at a step first: the smallest loss on the validation split, of several the first."""
    return sorted(range(len(fits)), key=lambda i: fits[i].loss_at(step))


def _alone(trainers: Sequence[Trainer], cut: int, end: int) -> int:
    """The best at the cut goes on up to `end` or to the target; where its loss stops being finite, the next best."""
    for number in ranked([t.fit for t in trainers], cut):
        reached = _together([trainers[number]], end)
        if not trainers[number].fit.diverged:
            return reached
    return end


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
