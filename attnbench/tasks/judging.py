"""A model that has learned is judged on the test split, and what its record says of its training."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from attnbench.batches import prepared
from attnbench.tasks import routing
from attnbench.tasks.models import recipe
from attnbench.train import Trainer
from attnbench.trials import Training, Trial

if TYPE_CHECKING:
    from attnbench.case import Case
    from attnbench.nn import TinyTransformer
    from attnbench.recipe import Fit, Score
    from attnbench.tasks.learning import Outcome
    from attnbench.tasks.trained import TrainedTask

_SHARED = ("warmup", "weight_decay", "betas", "clip", "evaluations", "validated", "tested", "rung", "errors", "target", "examples", "last")
"""settings of the recipe that are the same for every case of a task"""


def judged(model: TinyTransformer, case: Case, task: TrainedTask, device: str, training: Training) -> tuple[Score, Training]:
    """Score on the test split, and the training record with its slices and the routing of the model."""
    settings = recipe(case, 1.0)
    trainer = Trainer(model, task, settings, device)
    score = trainer.evaluate("test")
    with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
        layers = routing.layers(model, prepared(task, "test", 0, settings).to(device))
    seen: dict[str, Any] = routing.summary(layers, case.n, pictures=task.grid(case.n) is not None)
    return score, replace(training, groups=score.groups, notes=(*training.notes, *task.notes()), **seen)


def training_of(case: Case, task: TrainedTask, model: TinyTransformer, outcome: Outcome) -> Training:
    """What the record of a case says of the training that led to this outcome, before the model is judged."""
    settings = recipe(case, 1.0)
    return Training(
        trials=tuple(_trial(case, fit) for fit in outcome.fits),
        rate=float("nan") if outcome.best is None else outcome.fits[outcome.best].rate,
        parameters=model.parameter_count,
        mixing_parameters=model.mixing_count,
        width=case.heads * case.dim,
        group=task.group,
        chance=task.chance,
        graph=all(fit.graph for fit in outcome.fits),
        together=outcome.together,
        recipe={name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items() if name in _SHARED},
        data_hash=task.batch("train", 0, case.batch, case.n, case.seed).digest,
        notes=tuple(dict.fromkeys(note for fit in outcome.fits for note in fit.notes)),
    )


def _trial(case: Case, fit: Fit) -> Trial:
    speed = fit.timed * case.batch * case.n / fit.seconds if fit.seconds > 0 else None
    return Trial(fit.rate, fit.step, tuple(fit.losses), tuple(fit.validation), fit.diverged, speed)
