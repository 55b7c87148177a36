"""A model that was trained with one method is evaluated with another in its place."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from attnbench import checkpoint, distributed
from attnbench.case import laid, other_method
from attnbench.errors import UserError
from attnbench.files import alone
from attnbench.recipe import Fit
from attnbench.record import Record, Status
from attnbench.tasks import learning
from attnbench.tasks.judging import judged, training_of
from attnbench.tasks.learning import Outcome
from attnbench.tasks.models import architecture, fresh, implementation, reasons, recipe
from attnbench.train import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from attnbench.case import Case
    from attnbench.nn import TinyTransformer
    from attnbench.tasks.trained import TrainedTask
    from attnbench.trials import Trial


def run(case: Case, task: TrainedTask, device: str, folder: Path | None) -> Record:
    """Train with one method, or take the model that an earlier cell left, and test with another in its place.

    Many cells share one training, whose curves only the cell of the method that trained keeps.
    """
    origin = base(case)
    if why := reasons(origin, task, device):
        return Record(case, Status.UNSUPPORTED, "", reasons=tuple(f"trained with {case.trained_with}: {reason}" for reason in why))
    outcome, before = _base_model(origin, task, device, folder)
    if outcome.best is None:
        reason = f"trained with {case.trained_with}: loss not finite at every learning rate"
        return Record(case, Status.DIVERGED, "", reasons=(reason,), training=training_of(origin, task, fresh(origin, task), outcome))
    model = fresh(case, task)
    lacking = transplant(outcome.state, model)
    score, training = judged(model, case, task, device, training_of(case, task, model, outcome))
    trials = training.trials if replace(case, trained_with="") == origin else tuple(map(_without_curves, training.trials))
    notes = (f"not trained, as initialised: {', '.join(lacking[:4])}",) if lacking else ()
    metrics = {"accuracy": score.accuracy, "accuracy_before": before, "test_loss": score.loss, "parameters": float(training.parameters)}
    return Record(
        case,
        Status.OK,
        "",
        implementation(case, device),
        learned=model.mixing_count,
        input_hash=training.data_hash,
        training=replace(training, notes=training.notes + notes, trials=trials),
        metrics=metrics,
    )


def _without_curves(trial: Trial) -> Trial:
    return replace(trial, losses=(), validation=())


def base(case: Case) -> Case:
    """The case whose model a swap-in takes over. Raises `UserError` for parameters that make no sense."""
    method, values = other_method(case.trained_with)
    plain = replace(case, method=method.name, implementation=method.pinned, trained_with="")
    told: dict[str, Any] = {"causal": dict(case.params).get("causal", False), **laid(method, plain), **values}
    return replace(plain, params=tuple(sorted(method.parse(told).as_dict().items())))


def _base_model(origin: Case, task: TrainedTask, device: str, folder: Path | None) -> tuple[Outcome, float]:
    """The trained model that swap-ins share, and its accuracy; written once, by the first cell that needs it, and read by the others."""
    if folder is None:
        return _trained(origin, task, device, folder)
    path, group = folder / f"{origin.case_id}.pt", distributed.current()
    with alone(path) if group.size == 1 else nullcontext():
        if path.exists():
            found = checkpoint.load(path)
            checkpoint.hold(path, "architecture", architecture(origin, task).differences(found["architecture"]))
            fits = tuple(Fit(**fit) for fit in found["fits"])
            for fit in fits:
                fit.notes += checkpoint.of_other_code(found, "trained")
            return Outcome(fits, found["best"], found["model"]), float(found["accuracy"])
        outcome, accuracy = _trained(origin, task, device, folder)
        if outcome.best is not None and group.main:
            form = {"architecture": architecture(origin, task).as_dict(), "model": outcome.state, "best": outcome.best}
            checkpoint.save(path, {**form, "accuracy": accuracy, "fits": [asdict(fit) for fit in outcome.fits]})
            shutil.rmtree(folder / origin.case_id, ignore_errors=True)
        return outcome, accuracy


def forget(case: Case, folder: Path) -> None:
    """Let a case be trained anew: what earlier runs kept of its model is removed; of a long recipe it is set aside, as `<name>.old`."""
    try:
        origin = base(case) if case.trained_with else case
    except UserError:  # its record says so
        return
    for path in (folder / origin.case_id, folder / f"{origin.case_id}.pt"):
        if case.recipe != "small" and path.exists():
            _remove(old := path.with_name(f"{path.name}.old"))
            path.replace(old)
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _trained(origin: Case, task: TrainedTask, device: str, folder: Path | None) -> tuple[Outcome, float]:
    outcome = learning.train(origin, task, device, folder)
    if outcome.best is None:
        return outcome, 0.0
    model = fresh(origin, task)
    model.load_state_dict(outcome.state)
    return outcome, Trainer(model, task, recipe(origin, 1.0), device).evaluate("test").accuracy


def transplant(state: dict[str, Tensor], model: TinyTransformer) -> list[str]:
    """Load all that models share, and return the names of what the model's own method learns and the state lacks.

    Learned weights of the method that trained the state are left out. Raises `UserError` where anything else differs.
    """
    own, owned = model.state_dict(), ".operator."
    shared = {name: x for name, x in state.items() if owned not in name}
    wrong = [name for name, x in own.items() if owned not in name and (name not in shared or shared[name].shape != x.shape)]
    wrong += [name for name in shared if name not in own]
    checkpoint.hold_weights(wrong)
    kept = {name: x for name, x in state.items() if owned in name and name in own and own[name].shape == x.shape}
    model.load_state_dict({**own, **kept, **shared})
    return [name for name in own if owned in name and name not in kept]
