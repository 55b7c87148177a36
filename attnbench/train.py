"""The loop that trains a small transformer: the same recipe for every method.

AdamW, a linear warm-up and a cosine to zero, clipped gradients, bfloat16 autocast where asked for. Batch i is a pure function of
(task, N, seed, i) and every random state is saved, so that a run that was killed goes on and ends with the same weights, on the CPU bit
for bit. A loss that is not finite ends the run, as a result.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from attnbench import checkpoint
from attnbench.batches import Feed, Prepared, prepared
from attnbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from attnbench.nn import TinyTransformer
    from attnbench.tasks.trained import Split, TrainedTask

_POINTS = 100
"""points of a learning curve, at most"""
_SLICES, _RANGES = 16, 8
"""slices told apart, and ranges that more of them are told by"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; with a task, N, a seed and an architecture it determines the result."""

    steps: int
    rate: float
    """largest learning rate"""
    batch: int
    n: int
    seed: int = 0
    warmup: float = 0.1
    """share of the steps over which the rate rises to its largest value"""
    weight_decay: float = 0.05
    """of matrices; biases, norms and positions have none"""
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    """largest norm of the gradient"""
    autocast: bool = False
    """whether products are taken in bfloat16"""
    evaluations: int = 20
    """how often the validation split is looked at"""
    validated: int = 1024
    """examples of the validation split looked at each time, at most; fewer where that would take over an eighth of the training"""
    tested: int = 4096
    """examples of the test split, at most; fewer where that would be over a quarter of those trained on"""
    target: float = 0.999
    """validation accuracy at which training may stop"""

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def batches(self, split: Split, available: int = 0) -> int:
        """Batches of a held-out split that are looked at; `available` is the number of examples there are, 0 for no end."""
        trained = self.steps * self.batch
        wanted = min(self.tested, trained // 4) if split == "test" else min(self.validated, trained // (8 * self.evaluations))
        return max(1, math.ceil(min(wanted, available or wanted) / self.batch))

    @property
    def interval(self) -> int:
        """Steps between evaluations."""
        return max(1, self.steps // self.evaluations)


@dataclass
class Score:
    """How a model does on a held-out split."""

    accuracy: float
    loss: float
    groups: dict[str, float] = field(default_factory=dict)
    """slice -> accuracy; ranges of about as many examples each, `LOW-HIGH`, where there would be many slices"""


@dataclass
class Fit:
    """What one training run left behind."""

    rate: float
    step: int = 0
    """steps taken"""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean training loss since the point before)"""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, accuracy on the validation split)"""
    diverged: bool = False
    """whether a loss was not finite"""
    seconds: float = 0.0
    """spent in training steps, the first excluded, evaluations too"""
    timed: int = 0
    """steps of those seconds"""
    notes: list[str] = field(default_factory=list)

    @property
    def reached(self) -> float:
        """Validation accuracy at the end; 0 where there is none."""
        return 0.0 if self.diverged or not self.validation else self.validation[-1][1]


@dataclass
class Trainer:
    """Trains one model on one task. `tell` is called with a line of progress now and then."""

    model: TinyTransformer
    task: TrainedTask
    recipe: Recipe
    device: str = "cpu"
    path: Path | None = None
    """where the checkpoint lies; None writes none"""
    save_s: float = 60.0
    """seconds between checkpoints"""
    tell: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.optimizer = _optimizer(self.model, self.recipe, self.device)
        self.fit = Fit(self.recipe.rate)
        if self.path and self.path.exists():
            self._resume(self.path)

    def run(self) -> Fit:
        """Train to the end, to the target or to a loss that is not finite; the model is left as it then is."""
        r, fit = self.recipe, self.fit
        if fit.diverged or fit.step >= r.steps or fit.reached >= r.target:
            return fit
        self.model.train()
        total, since, saved = torch.zeros((), device=self.device), fit.step, time.perf_counter()
        points = max(1, r.steps // _POINTS)
        begun, begun_at = 0.0, fit.step
        with Feed(self.task, "train", r, self.device, first=fit.step) as feed:
            for batch in feed:
                total = total + self.step(batch)
                fit.step += 1
                if begun == 0.0:  # the first step compiles and warms
                    _wait(self.device)
                    begun, begun_at = time.perf_counter(), fit.step
                last = fit.step == r.steps
                if not (last or fit.step % points == 0 or fit.step % r.interval == 0):
                    continue
                loss = float(total) / (fit.step - since)
                if not math.isfinite(loss):
                    fit.diverged = True
                    break
                fit.losses.append((fit.step, loss))
                total, since = torch.zeros((), device=self.device), fit.step
                if last or fit.step % r.interval == 0:
                    fit.seconds, fit.timed = fit.seconds + time.perf_counter() - begun, fit.timed + fit.step - begun_at
                    self._validate(loss)
                    begun, begun_at = time.perf_counter(), fit.step
                if fit.reached >= r.target or last:
                    break
                if self.path and time.perf_counter() - saved >= self.save_s:
                    self.save()
                    saved = time.perf_counter()
        if self.path:
            self.save()
        return fit

    def step(self, batch: Prepared) -> Tensor:
        """One update; returns the loss, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.fit.step)
        loss = self._loss(batch)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, batch: Prepared) -> tuple[Tensor, Tensor]:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.autocast):
            scores = self.model(batch.inputs, batch.positions, batch.mask)
        return cross_entropy(scores.float(), batch.targets), scores

    def evaluate(self, split: Split) -> Score:
        """Accuracy on a held-out split, and for each of its slices."""
        training = self.model.training
        self.model.eval()
        right, groups, losses = [], [], []
        with torch.no_grad():
            for index in range(self.recipe.batches(split, self.task.held_out)):
                batch = prepared(self.task, split, index, self.recipe).to(self.device)
                loss, scores = self._loss(batch)
                right.append((scores.argmax(-1) == batch.targets).cpu())
                groups.append(batch.groups.cpu())
                losses.append(float(loss))
        self.model.train(training)
        most = self.task.held_out or None  # a finite split starts over in the last batch
        hits, slices = torch.cat(right).double()[:most], torch.cat(groups)[:most]
        return Score(float(hits.mean()), sum(losses) / len(losses), _by_slice(hits, slices))

    def _validate(self, loss: float) -> None:
        fit, r = self.fit, self.recipe
        fit.validation.append((fit.step, self.evaluate("validation").accuracy))
        left = (r.steps - fit.step) * fit.seconds / max(1, fit.timed)
        self.tell(f"rate {r.rate:g}, step {fit.step}/{r.steps}, loss {loss:.3f}, accuracy {fit.reached:.3f}, {left:.0f} s left")

    def save(self) -> None:
        """Write a checkpoint; where that fails, the last one stands, training goes on and `notes` says so."""
        assert self.path is not None, "a trainer without a path saves nothing"
        state = {
            "architecture": self.model.architecture.as_dict(),
            "task": self.task.name,
            "recipe": _plain(asdict(self.recipe)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fit": _plain(asdict(self.fit)),
            "random": _random(self.device),
        }
        try:
            checkpoint.save(self.path, state)
        except UserError as error:
            self.fit.notes.append(str(error))

    def _resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `UserError` where it is of another model, task or recipe."""
        state = checkpoint.load(path)
        checkpoint.hold(path, "architecture", self.model.architecture.differences(state["architecture"]))
        own = {"task": self.task.name, **_plain(asdict(self.recipe))}
        there = {"task": state["task"], **state["recipe"]}
        checkpoint.hold(path, "recipe", [f"{k} = {there.get(k)!r} there, {v!r} here" for k, v in own.items() if there.get(k) != v])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        fit = state["fit"]
        self.fit = Fit(**{**fit, **{k: [(int(a), float(b)) for a, b in fit[k]] for k in ("losses", "validation")}})
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and self.device == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"])


def _by_slice(hits: Tensor, slices: Tensor) -> dict[str, float]:
    """Accuracy of each slice, or of ranges of slices."""
    values = slices.unique()
    if len(values) <= _SLICES:
        return {str(g): float(hits[slices == g].mean()) for g in values.tolist()}
    inner = slices.double().quantile(torch.arange(1, _RANGES, dtype=torch.float64) / _RANGES).unique()
    numbers = torch.bucketize(slices.double(), inner)
    parts = [numbers == number for number in numbers.unique().tolist()]
    return {f"{int(slices[part].min())}-{int(slices[part].max())}": float(hits[part].mean()) for part in parts}


def _optimizer(model: nn.Module, recipe: Recipe, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    matrices = [x for x in model.parameters() if x.ndim >= 2]
    others = [x for x in model.parameters() if x.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=recipe.betas, fused=device == "cuda")


def _random(device: str) -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device == "cuda" else {})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """With lists for tuples, as a checkpoint gives them back."""
    return {k: [list(x) if isinstance(x, tuple) else x for x in v] if isinstance(v, list | tuple) else v for k, v in values.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
