"""Accuracy that is earned: a small transformer learns a task with a method, or is trained with one and evaluated with another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from attnbench import distributed
from attnbench.record import Record, Status
from attnbench.tasks import learning, swapped, trained
from attnbench.tasks.judging import judged, training_of
from attnbench.tasks.models import fresh, implementation, reasons

if TYPE_CHECKING:
    from pathlib import Path

    from attnbench.case import Case
    from attnbench.tasks.learning import Outcome
    from attnbench.tasks.trained import TrainedTask


def run(case: Case, device: str, folder: Path | None = None) -> Record:
    """Train and test one case, with checkpoints under `folder` where it is given.

    Metrics: `accuracy` and `test_loss` on the test split, `train_tokens_per_s`, `parameters`, and with `trained_with` also
    `accuracy_before`, that of the model as it was trained. Raises `UserError` for a case that asks for no task or for one that does not
    fit N.
    """
    task = trained.get(case.data)
    if why := reasons(case, task, device):
        return Record(case, Status.UNSUPPORTED, "", reasons=tuple(why))
    distributed.begin(case, device, folder)
    return swapped.run(case, task, device, folder) if case.trained_with else _trained(case, task, device, folder)


def _trained(case: Case, task: TrainedTask, device: str, folder: Path | None) -> Record:
    outcome = learning.train(case, task, device, folder)
    record = _tested(case, task, device, outcome)
    if folder and case.recipe == "small":  # others took days, and somebody will want the model
        shutil.rmtree(folder / case.case_id, ignore_errors=True)
    return record


def _tested(case: Case, task: TrainedTask, device: str, outcome: Outcome) -> Record:
    """The record of a case, its best model judged on the test split."""
    model = fresh(case, task)
    training = training_of(case, task, model, outcome)
    record = Record(
        case, Status.OK, "", implementation(case, device), learned=model.mixing_count, input_hash=training.data_hash, training=training
    )
    if outcome.best is None:
        return replace(record, status=Status.DIVERGED, reasons=("loss not finite at every learning rate",))
    model.load_state_dict(outcome.state)
    score, training = judged(model, case, task, device, training)
    speed = training.trials[outcome.best].tokens_per_s
    metrics = {"accuracy": score.accuracy, "test_loss": score.loss, "parameters": float(training.parameters)}
    metrics |= {} if speed is None else {"train_tokens_per_s": speed}
    return replace(record, training=training, metrics=metrics)
