"""What determines a training run, and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.tasks.trained import Split

_POINTS = 100
"""points of a learning curve, at most"""


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
    rung: float = 1 / 3
    """share of the steps after which, of several learning rates, only the one that does best goes on, see `race`; 1: all go on"""
    errors: float = 3.0
    """standard errors by which a rate has to do better than a guess before the others stop"""
    target: float = 0.999
    """validation accuracy at which training may stop"""
    last: float = 0.0
    """learning rate at the end, as a share of the largest"""
    examples: int = 0
    """training examples there are: a set that is gone through again and again, in another order each time; 0: every batch is new"""

    @property
    def interval(self) -> int:
        """Steps between evaluations."""
        return max(1, self.steps // self.evaluations)

    @property
    def points(self) -> int:
        """Steps between points of the learning curve."""
        return max(1, self.steps // _POINTS)

    @property
    def cut(self) -> int:
        """The step, one at which is evaluated, after which at the earliest only the best of several rates goes on."""
        if self.rung >= 1:
            return self.steps
        return min(self.steps, max(1, round(self.rung * self.steps / self.interval)) * self.interval)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * (self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))))

    def batches(self, split: Split, available: int = 0) -> int:
        """Batches of a held-out split that are looked at; `available` is the number of examples there are, 0 for no end."""
        trained = self.steps * self.batch
        wanted = min(self.tested, trained // 4) if split == "test" else min(self.validated, trained // (8 * self.evaluations))
        return max(1, math.ceil(min(wanted, available or wanted) / self.batch))


DEIT: dict[str, Any] = {
    "warmup": 5 / 300, "betas": (0.9, 0.999), "clip": math.inf, "last": 0.01, "evaluations": 60, "validated": 2048, "tested": 10**6,
}  # fmt: skip
"""Settings of a `Recipe` as Touvron et al. 2021, https://arxiv.org/abs/2012.12877, have them for 300 epochs at batch 1024 and rate 1e-3:
no clipping, a cosine from 1e-3 to 1e-5. All images of the test split are looked at. Weight decay is the same here and there."""
DROP_PATH = 0.1
"""stochastic depth of it, see `attnbench.nn.Architecture`"""


@dataclass
class Score:
    """How a model does on a held-out split."""

    accuracy: float
    loss: float
    groups: dict[str, float] = field(default_factory=dict)
    """slice -> accuracy; ranges of about as many examples each, `LOW-HIGH`, where there would be many slices"""
    constant: float = 0.0
    """accuracy of always giving the answer that is most often right"""


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
    judged: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on the validation split), of the same steps"""
    constant: float = 0.0
    """accuracy on the validation split of always giving the same answer"""
    diverged: bool = False
    """whether a loss was not finite"""
    seconds: float = 0.0
    """spent in training steps, the first excluded, evaluations too"""
    timed: int = 0
    """steps of those seconds"""
    graph: bool = False
    """whether steps were replayed from a CUDA graph"""
    notes: list[str] = field(default_factory=list)

    @property
    def reached(self) -> float:
        """Validation accuracy at the end; 0 where there is none."""
        return 0.0 if self.diverged or not self.validation else self.validation[-1][1]

    def loss_at(self, step: int) -> float:
        """Loss on the validation split at the last evaluation up to a step; infinite where there is none, or no finite loss by then."""
        found = [loss for at, loss in self.judged if at <= step]
        sound = found and math.isfinite(found[-1]) and not (self.diverged and self.step <= step)
        return found[-1] if sound else math.inf

    def accuracy_at(self, step: int) -> float:
        """Accuracy on the validation split at the last evaluation up to a step; 0 where there is none, or no finite loss by then."""
        gone = self.diverged and self.step <= step
        return 0.0 if gone else next((accuracy for at, accuracy in reversed(self.validation) if at <= step), 0.0)

    def upto(self, step: int) -> Fit:
        """What it was after so many steps; later ones are left out, but for their time."""
        if self.step <= step:
            return self
        curves: dict[str, Any] = {
            name: [point for point in getattr(self, name) if point[0] <= step] for name in ("losses", "validation", "judged")
        }
        return replace(self, step=step, diverged=False, **curves)
