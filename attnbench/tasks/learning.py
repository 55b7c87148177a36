"""The model of a case learns at all its learning rates, side by side or one after another, and the best is chosen."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from attnbench.case import rates
from attnbench.data import Data
from attnbench.isolate import Progress, report
from attnbench.race import race, run
from attnbench.tasks.models import architecture, fresh, recipe, why_eager
from attnbench.train import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from attnbench.case import Case
    from attnbench.recipe import Fit, Recipe
    from attnbench.tasks.trained import TrainedTask

DRAWN = "drawn"
"""folder beside the checkpoints where sets of examples lie that cells share"""
_TELL_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """What training a case led to."""

    fits: tuple[Fit, ...]
    best: int | None
    """number of the fit chosen; None where all diverged"""
    state: dict[str, Tensor]
    """weights of it, on the CPU"""
    together: int = 1
    """models that trained side by side"""


def train(case: Case, task: TrainedTask, device: str, folder: Path | None) -> Outcome:
    """One model a learning rate, as far as `race` says; the one that was best when it stopped is kept.

    On a GPU they train side by side, one after another where they do not fit or draw random numbers as they train, or on a CPU: that
    changes speed alone, see `race`.
    """
    settings, tried = recipe(case, 1.0), rates(case.rates)
    data = Data(task, settings, device, folder / DRAWN if folder else None)
    show = _Report(settings, len(tried))

    def trainer(rate: float) -> Trainer:
        path = folder / case.case_id / f"{rate:g}.pt" if folder else None
        why = why_eager(case, device)
        return show.watch(Trainer(fresh(case, task), task, recipe(case, rate), device, path, data=data, why_eager=why))

    draws = architecture(case, task).drop_path > 0  # from one state, which all in a process share
    if device != "cpu" and len(tried) > 1 and not draws and (outcome := _side_by_side(trainer, tried)):
        return outcome
    return _in_turn(trainer, tried, settings, task)


def _side_by_side(trainer: Callable[[float], Trainer], tried: Sequence[float]) -> Outcome | None:
    """All rates at once; None where their memory does not fit."""
    trainers: list[Trainer] = []
    try:
        trainers += [trainer(rate) for rate in tried]
        ended = race(trainers)
        return replace(_chosen(ended.fits, [_weights(t) for t in trainers]), together=len(tried))
    except torch.OutOfMemoryError:
        pass  # only behind it nothing holds what it held
    trainers.clear()
    _let_go()
    return None


def _in_turn(trainer: Callable[[float], Trainer], tried: Sequence[float], settings: Recipe, task: TrainedTask) -> Outcome:
    """One rate after another, as far as all of them go; then the one that goes on."""
    turns = _Turns(trainer, tried, settings, task)
    ended = run(turns)
    return _chosen(ended.fits, turns.weights)


class _Turns:
    """Models of several learning rates that have the device in turn; in between their states lie on the CPU."""

    def __init__(self, trainer: Callable[[float], Trainer], tried: Sequence[float], settings: Recipe, task: TrainedTask) -> None:
        self.trainer, self.tried, self.size = trainer, tried, len(tried)
        self.recipe, self.task = settings, task
        self._kept: dict[int, tuple[Fit, dict[str, Any]]] = {}

    @property
    def fits(self) -> list[Fit]:
        return [self._kept[number][0] for number in range(self.size)]

    @property
    def weights(self) -> list[dict[str, Tensor]]:
        return [self._kept[number][1]["model"] for number in range(self.size)]

    def together(self, end: int) -> int:
        for number in range(self.size):
            end = self.alone(number, end)
        return end

    def alone(self, number: int, end: int) -> int:
        one = self.trainer(self.tried[number])
        if number in self._kept:
            one.go_on(self._kept[number][1])
        reached = race([one], end).step
        self._kept[number] = one.fit, one.copied()
        del one
        _let_go()
        return reached


def _let_go() -> None:
    """Free models that nothing holds but themselves, and their graphs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _chosen(fits: Sequence[Fit], states: Sequence[dict[str, Tensor]]) -> Outcome:
    """The fit with the highest accuracy on the validation split, of several the one that went on, or the one with the smallest rate."""
    sound = [i for i, fit in enumerate(fits) if not fit.diverged]
    best = max(sound, key=lambda i: (fits[i].reached, fits[i].step), default=None)
    return Outcome(tuple(fits), best, {} if best is None else states[best])


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: x.detach().cpu().clone() for name, x in trainer.model.state_dict().items()}


class _Report:
    """Tells whoever runs this cell how far it is, about once a second."""

    def __init__(self, settings: Recipe, rates: int) -> None:
        self.settings, self.rates = settings, rates
        self.heard: dict[float, tuple[int, int, float, float]] = {}
        """rate -> steps taken, steps that a checkpoint holds, loss, accuracy; no model, so that those that are done are let go"""
        self.begun, self.last = 0, 0.0
        report(Progress(0, self.total, "drawing examples"))

    @property
    def total(self) -> int:
        """Steps of all models, at most, if the best goes on alone from here or from the cut."""
        steps = sorted(x[0] for x in self.heard.values())
        together = steps[-2] if len(steps) == self.rates > 1 else 0
        return self.settings.steps + (self.rates - 1) * max(self.settings.cut, together)

    def watch(self, trainer: Trainer) -> Trainer:
        """Tell of this model too."""
        if trainer.recipe.rate not in self.heard:
            self.begun += trainer.kept
            self._note(trainer)
        trainer.tell = self
        return trainer

    def _note(self, trainer: Trainer) -> None:
        self.heard[trainer.recipe.rate] = trainer.fit.step, trainer.kept, trainer.loss, trainer.fit.reached

    def __call__(self, trainer: Trainer) -> None:
        self._note(trainer)
        now = time.perf_counter()
        if now - self.last < _TELL_S:
            return
        self.last = now
        done, kept = sum(x[0] for x in self.heard.values()), sum(x[1] for x in self.heard.values())
        best = max(self.heard, key=lambda rate: self.heard[rate][3])
        text = f"loss {self.heard[best][2]:.3f}, accuracy {self.heard[best][3]:.3f} at rate {best:g}"
        report(Progress(done, self.total, text, kept=kept, gained=kept > self.begun))
