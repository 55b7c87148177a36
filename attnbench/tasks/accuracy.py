"""Accuracy that is earned: a small transformer learns a task with a method, or is trained with one and evaluated with another."""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from attnbench import checkpoint, distributed
from attnbench.batches import prepared
from attnbench.case import laid, other_method, rates
from attnbench.data import Data
from attnbench.errors import UserError
from attnbench.isolate import Progress, report
from attnbench.nn import Architecture, TinyTransformer, built, told
from attnbench.race import race
from attnbench.recipe import DEIT, DROP_PATH, Fit, Recipe, Score
from attnbench.record import Record, Status, Training, Trial
from attnbench.tasks import routing, trained
from attnbench.train import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from attnbench.case import Case
    from attnbench.tasks.trained import TrainedTask

_DTYPES = ("float32", "bfloat16")
_SHARED = ("warmup", "weight_decay", "betas", "clip", "evaluations", "validated", "tested", "target", "examples", "last")
"""settings of the recipe that are the same for every case of a task"""
EXAMPLES = 1 << 17
"""training examples of a task that draws them: as many as published, which is 100k (mqar), 96k (listops) and 128k (pathfinder)"""
DRAWN = "drawn"
"""folder beside the checkpoints where sets of examples lie that cells share"""
_TELL_S = 1.0


@dataclass(frozen=True)
class _Outcome:
    """What training a case led to."""

    fits: tuple[Fit, ...]
    best: int | None
    """number of the fit chosen; None where all diverged"""
    state: dict[str, Tensor]
    """weights of it, on the CPU"""
    together: int = 1
    """models that trained side by side"""


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
    return _swapped(case, task, device, folder) if case.trained_with else _trained(case, task, device, folder)


def reasons(case: Case, task: TrainedTask, device: str) -> list[str]:
    """Why a method cannot be trained on a task; empty where it can."""
    method, params = case.resolve()
    found = [] if case.dtype in _DTYPES else [f"models train in {' or '.join(_DTYPES)}, not in {case.dtype}"]
    if params.causal not in task.forms():
        need, have = ("causal", "reads later tokens") if task.causal else ("bidirectional", "reads no later token")
        found.append(f"{task.name} is a {need} task, and {case.label} with causal = {str(params.causal).lower()} {have}")
    chosen, why = method.choose(case.shape, getattr(torch, case.dtype), device, params, backward=not case.trained_with)
    if case.model != "small":
        try:
            told(method, 1, task.grid(case.n), causal=params.causal)
        except UserError as error:
            found.append(f"{error}, as model = small has it")
    return found + ([] if chosen else why)


def architecture(case: Case, task: TrainedTask) -> Architecture:
    """The model of a case."""
    params = dict(case.params)
    return Architecture(
        method=case.label,
        params=params,
        vocabulary=task.vocabulary,
        features=task.features,
        classes=task.classes,
        tokens=case.n,
        grid=task.grid(case.n),
        dim=case.heads * case.dim,
        heads=case.heads,
        depth=case.depth,
        positions=case.positions,  # type: ignore[arg-type]
        short_conv=case.short_conv,
        causal=bool(params.get("causal", False)),
        per_token=task.per_token,
        class_token=case.model != "small",
        qkv_bias=case.model != "small",
        drop_path=DROP_PATH if case.recipe == "deit" else 0.0,
        library="timm" if case.model == "timm" else "",
    )


def recipe(case: Case, rate: float) -> Recipe:
    """How a case is trained at one learning rate."""
    settings = DEIT if case.recipe == "deit" else {}
    plain = Recipe(steps=case.steps, rate=rate, batch=case.batch, n=case.n, seed=case.seed, autocast=case.dtype == "bfloat16", **settings)
    return plain if ":" in case.data else replace(plain, examples=trained.get(case.data).examples or EXAMPLES)


def _model(case: Case, task: TrainedTask) -> TinyTransformer:
    """Freshly initialised from the case's seed; torch's random state goes on from there."""
    torch.manual_seed(case.seed)
    return built(architecture(case, task))


def _train(case: Case, task: TrainedTask, device: str, folder: Path | None) -> _Outcome:
    """One model a learning rate, up to the evaluation at which the first reaches the target; the best there is kept.

    On a GPU they train side by side, one after another where they do not fit, or on a CPU: that changes speed alone, see `race`.
    """
    data = Data(task, recipe(case, 1.0), device, folder / DRAWN if folder else None)
    tried = rates(case.rates)
    show = _Report(case.steps, len(tried))

    def trainer(rate: float) -> Trainer:
        path = folder / case.case_id / f"{rate:g}.pt" if folder else None
        why = _why_eager(case, device)
        return show.watch(Trainer(_model(case, task), task, recipe(case, rate), device, path, data=data, why_eager=why))

    if device != "cpu" and len(tried) > 1 and (outcome := _side_by_side(trainer, tried)):
        return outcome
    return _in_turn(trainer, tried)


def _side_by_side(trainer: Callable[[float], Trainer], tried: Sequence[float]) -> _Outcome | None:
    """All rates at once; None where their memory does not fit."""
    trainers: list[Trainer] = []
    try:
        trainers += [trainer(rate) for rate in tried]
        race(trainers)
        return replace(_chosen([t.fit for t in trainers], [_weights(t) for t in trainers]), together=len(tried))
    except torch.OutOfMemoryError:
        pass  # only behind it nothing holds what it held
    trainers.clear()
    _let_go()
    return None


def _in_turn(trainer: Callable[[float], Trainer], tried: Sequence[float]) -> _Outcome:
    """One rate after another, each as far as the least that any needed to reach the target."""
    fits, states, end = [], [], None
    for rate in tried:
        one = trainer(rate)
        end = race([one], end)
        fits.append(one.fit)
        states.append(_weights(one))
        del one
        _let_go()
    return _chosen([fit.upto(end) if end else fit for fit in fits], states)


def _let_go() -> None:
    """Free models that nothing holds but themselves, and their graphs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _chosen(fits: Sequence[Fit], states: Sequence[dict[str, Tensor]]) -> _Outcome:
    """The fit with the highest accuracy on the validation split, of several the one with the smallest rate."""
    sound = [i for i, fit in enumerate(fits) if not fit.diverged]
    best = max(sound, key=lambda i: fits[i].reached, default=None)
    return _Outcome(tuple(fits), best, {} if best is None else states[best])


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: x.detach().cpu().clone() for name, x in trainer.model.state_dict().items()}


def _why_eager(case: Case, device: str) -> str:
    """Why a step of this case cannot be captured in a CUDA graph; empty where it can."""
    method, params = case.resolve()
    dtype = getattr(torch, case.dtype)
    chosen, _ = method.choose(case.shape, dtype, device, params, backward=True)
    found = method.reasons(chosen, case.shape, dtype, device, params, backward=True, graph=True) if chosen and device != "cpu" else []
    return "; ".join(found)


class _Report:
    """Tells whoever runs this cell how far it is, about once a second."""

    def __init__(self, steps: int, models: int) -> None:
        self.total = steps * models
        self.heard: dict[float, tuple[int, int, float, float]] = {}
        """rate -> steps taken, steps that a checkpoint holds, loss, accuracy; no model, so that those that are done are let go"""
        self.begun, self.last = 0, 0.0
        report(Progress(0, self.total, "drawing examples"))

    def watch(self, trainer: Trainer) -> Trainer:
        """Tell of this model too."""
        if trainer.recipe.rate not in self.heard:
            self.begun += trainer.kept
        trainer.tell = self
        return trainer

    def __call__(self, trainer: Trainer) -> None:
        self.heard[trainer.recipe.rate] = trainer.fit.step, trainer.kept, trainer.loss, trainer.fit.reached
        now = time.perf_counter()
        if now - self.last < _TELL_S:
            return
        self.last = now
        done, kept = sum(x[0] for x in self.heard.values()), sum(x[1] for x in self.heard.values())
        best = max(self.heard, key=lambda rate: self.heard[rate][3])
        text = f"loss {self.heard[best][2]:.3f}, accuracy {self.heard[best][3]:.3f} at rate {best:g}"
        report(Progress(done, self.total, text, kept=kept, gained=kept > self.begun))


def _trained(case: Case, task: TrainedTask, device: str, folder: Path | None) -> Record:
    outcome = _train(case, task, device, folder)
    record = _tested(case, task, device, outcome)
    if folder and case.recipe == "small":  # others took days, and somebody will want the model
        shutil.rmtree(folder / case.case_id, ignore_errors=True)
    return record


def _tested(case: Case, task: TrainedTask, device: str, outcome: _Outcome) -> Record:
    """The record of a case, its best model judged on the test split."""
    model = _model(case, task)
    training = _training(case, task, model, outcome)
    record = Record(
        case, Status.OK, "", _implementation(case, device), learned=model.mixing_count, input_hash=training.data_hash, training=training
    )
    if outcome.best is None:
        return replace(record, status=Status.DIVERGED, reasons=("loss not finite at every learning rate",))
    model.load_state_dict(outcome.state)
    score, training = _judged(model, case, task, device, training)
    speed = training.trials[outcome.best].tokens_per_s
    metrics = {"accuracy": score.accuracy, "test_loss": score.loss, "parameters": float(training.parameters)}
    metrics |= {} if speed is None else {"train_tokens_per_s": speed}
    return replace(record, training=training, metrics=metrics)


def _judged(model: TinyTransformer, case: Case, task: TrainedTask, device: str, training: Training) -> tuple[Score, Training]:
    """Score on the test split, and the training record with its slices and the routing of the model."""
    settings = recipe(case, 1.0)
    trainer = Trainer(model, task, settings, device)
    score = trainer.evaluate("test")
    with torch.autocast(device, torch.bfloat16, enabled=settings.autocast):
        layers = routing.layers(model, prepared(task, "test", 0, settings).to(device))
    seen: dict[str, Any] = routing.summary(layers, case.n, pictures=task.grid(case.n) is not None)
    return score, replace(training, groups=score.groups, notes=(*training.notes, *task.notes()), **seen)


def _training(case: Case, task: TrainedTask, model: TinyTransformer, outcome: _Outcome) -> Training:
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


def _implementation(case: Case, device: str) -> str:
    method, params = case.resolve()
    chosen, _ = method.choose(case.shape, getattr(torch, case.dtype), device, params, backward=not case.trained_with)
    return chosen.name if chosen else ""


def base(case: Case) -> Case:
    """The case whose model a swap-in takes over. Raises `UserError` for parameters that make no sense."""
    method, values = other_method(case.trained_with)
    plain = replace(case, method=method.name, implementation=method.pinned, trained_with="")
    told: dict[str, Any] = {"causal": dict(case.params).get("causal", False), **laid(method, plain), **values}
    return replace(plain, params=tuple(sorted(method.parse(told).as_dict().items())))


def _swapped(case: Case, task: TrainedTask, device: str, folder: Path | None) -> Record:
    """Train with one method, or take the model that an earlier cell left, and test with another in its place."""
    origin = base(case)
    if why := reasons(origin, task, device):
        return Record(case, Status.UNSUPPORTED, "", reasons=tuple(f"trained with {case.trained_with}: {reason}" for reason in why))
    outcome, before = _base_model(origin, task, device, folder)
    if outcome.best is None:
        reason = f"trained with {case.trained_with}: loss not finite at every learning rate"
        return Record(case, Status.DIVERGED, "", reasons=(reason,), training=_training(origin, task, _model(origin, task), outcome))
    model = _model(case, task)
    fresh = transplant(outcome.state, model)
    score, training = _judged(model, case, task, device, _training(case, task, model, outcome))
    notes = (f"not trained, as initialised: {', '.join(fresh[:4])}",) if fresh else ()
    metrics = {"accuracy": score.accuracy, "accuracy_before": before, "test_loss": score.loss, "parameters": float(training.parameters)}
    return Record(
        case,
        Status.OK,
        "",
        _implementation(case, device),
        learned=model.mixing_count,
        input_hash=training.data_hash,
        training=replace(training, notes=training.notes + notes),
        metrics=metrics,
    )


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


def _base_model(origin: Case, task: TrainedTask, device: str, folder: Path | None) -> tuple[_Outcome, float]:
    """The trained model that swap-ins share, and its accuracy; written once, read by later cells."""
    path = folder / f"{origin.case_id}.pt" if folder else None
    if path and path.exists():
        found = checkpoint.load(path)
        checkpoint.hold(path, "architecture", architecture(origin, task).differences(found["architecture"]))
        fits = tuple(Fit(**fit) for fit in found["fits"])
        return _Outcome(fits, found["best"], found["model"]), float(found["accuracy"])
    outcome = _train(origin, task, device, folder)
    if outcome.best is None:
        return outcome, 0.0
    model = _model(origin, task)
    model.load_state_dict(outcome.state)
    accuracy = Trainer(model, task, recipe(origin, 1.0), device).evaluate("test").accuracy
    if path and folder and distributed.current().main:
        form = {"architecture": architecture(origin, task).as_dict(), "model": outcome.state, "best": outcome.best, "accuracy": accuracy}
        checkpoint.save(path, {**form, "fits": [asdict(fit) for fit in outcome.fits]})
        shutil.rmtree(folder / origin.case_id, ignore_errors=True)
    return outcome, accuracy
