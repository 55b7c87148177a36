"""The loop that trains a small transformer: the same recipe for every method.

AdamW, a linear warm-up and a cosine to zero, clipped gradients, bfloat16 autocast where asked for. Batch i is a pure function of task and
recipe, and every random state is saved: a run that was killed goes on and ends with the same weights, on the CPU bit for bit. A loss that
is not finite ends the run, as a result.

On a GPU a whole step, from picking the batch to the update, is captured in a CUDA graph where it can be, and the validation split in
another: a small model in eager mode would wait for its launches most of the time. Losses are read back now and then.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from attnbench import checkpoint, distributed
from attnbench.batches import IGNORED
from attnbench.data import Data
from attnbench.errors import UserError, differences
from attnbench.nn.fusing import compiled, fuse
from attnbench.optimizer import optimizer
from attnbench.race import race
from attnbench.recipe import Fit, Recipe, Score
from attnbench.replay import Replayed
from attnbench.slices import by_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from attnbench.batches import Prepared
    from attnbench.nn import TinyTransformer
    from attnbench.tasks.trained import Split, TrainedTask

    Seen = tuple[Tensor, ...]

__all__ = ["Fit", "Recipe", "Score", "Trainer", "race"]


@dataclass
class Trainer:
    """Trains one model on one task. `tell` is called now and then, where the loss may be read."""

    model: TinyTransformer
    task: TrainedTask
    recipe: Recipe
    device: str = "cpu"
    path: Path | None = None
    """where the checkpoint lies; None writes none"""
    save_s: float = 20.0
    """seconds between checkpoints; at first a second and a tenth of the time spent, so that a short run is not lost as a whole"""
    tell: Callable[[Trainer], None] = lambda _: None
    data: Data | None = None
    """shared by models that train side by side; None makes its own"""
    why_eager: str = ""
    """why steps may not be captured in a CUDA graph; empty where they may"""

    def __post_init__(self) -> None:
        self._entropy: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _entropy
        self.model.to(self.device)
        self.group = distributed.current()
        if self.device != "cpu" and not self.group.why_eager:
            fuse(self.model)
            self._entropy = compiled(_entropy)
        self._parallel = self.group.wrap(self.model)
        self.batches = self.data or Data(self.task, self.recipe, self.device)
        self.optimizer = optimizer(self.model, self.recipe, self.device)
        self.fit, self.loss = Fit(self.recipe.rate), 0.0
        self.total = torch.zeros((), device=self.device)
        self.kept, self._begun = 0, time.perf_counter()
        self._saved = self._begun
        self._steps = Replayed(self._queued, self.device, self.why_eager or self.group.why_eager)
        self._looks = Replayed(self._look, self.device, "" if self.batches.stored else "not stored", beside=self._steps)
        self._static: Prepared | None = None
        if self.device != "cpu":
            self._count = torch.zeros(1, dtype=torch.long, device=self.device)
            self._rates = torch.tensor([self.recipe.rate_at(i) for i in range(self.recipe.steps)], device=self.device)
        if self.path and self.path.exists():
            self._resume(self.path)

    def run(self) -> Fit:
        """Train to the end, to the target or to a loss that is not finite; the model is left as it then is."""
        race([self])
        return self.fit

    @property
    def over(self) -> bool:
        """Whether no step is left to take."""
        fit, r = self.fit, self.recipe
        return fit.diverged or fit.step >= r.steps or fit.reached >= r.target

    @property
    def settled(self) -> bool:
        """Whether steps to come take as long as the last."""
        return self._steps.settled

    def take(self, batch: Prepared | None) -> None:
        """One step; on a GPU it is queued, and picks its batch itself where there is none."""
        if batch is not None and self.device != "cpu":
            self._receive(batch)
        if self.device == "cpu":
            assert batch is not None, "a CPU is handed its batches"
            self.total = self.total + self.step(batch)
        else:
            self._steps()
        self.fit.step += 1

    def step(self, batch: Prepared) -> Tensor:
        """One update; returns the loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self._set_rate()
        loss = self._loss(batch)[0]
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.detach()

    def _set_rate(self) -> None:
        for group in self.optimizer.param_groups:
            if self.device == "cpu":
                group["lr"] = self.recipe.rate_at(self.fit.step)
            else:
                group["lr"].copy_(self._rates.index_select(0, self._count).squeeze(0))

    def _queued(self) -> None:
        """A step on a GPU: reads and writes the same tensors every time, and never waits."""
        batch = self._static if self._static is not None else self.batches.picked(self._count)
        self.total.add_(self.step(batch))
        self._count.add_(1)

    def _receive(self, batch: Prepared) -> None:
        """Copy a batch to where a captured step reads it; where batches differ in shape, steps are not captured."""
        with self._steps.on_stream():
            if self._static is not None and self._static.alike(batch):
                self._static.fill(batch)
            elif self._static is None:
                self._static = batch.copy()
            else:
                self._static = batch.copy()
                self._steps.give_up("batches differ in shape")
        batch.keep_for(self._steps.stream)

    def _loss(self, batch: Prepared) -> tuple[Tensor, Tensor]:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.recipe.autocast):
            scores = self._parallel(batch.inputs, batch.positions, batch.mask)
        return self._entropy(scores, batch.targets, batch.shares() if self.task.alike else None), scores

    def wait(self) -> None:
        """Until all steps taken are done."""
        self._steps.wait()

    def look(self) -> None:
        """Read the loss and evaluate where it is time to, save what there is, and tell of it. Steps taken are done."""
        r, fit = self.recipe, self.fit
        evaluated = fit.step % r.interval == 0 or fit.step == r.steps
        if evaluated or fit.step % r.points == 0:
            self._read()
        if evaluated and not fit.diverged:
            score = self.evaluate("validation")
            fit.validation.append((fit.step, score.accuracy))
            fit.judged.append((fit.step, score.loss))
            fit.constant = score.constant
        if self.path and self.group.main and not self.over and self._due():
            self.save()
        self.tell(self)

    def _due(self) -> bool:
        now = time.perf_counter()
        return now - self._saved >= min(self.save_s, 1 + 0.1 * (now - self._begun))

    def _read(self) -> None:
        """The mean loss since the last point of the curve."""
        fit = self.fit
        self.loss = float(self.group.mean(self.total)) / (fit.step - (fit.losses[-1][0] if fit.losses else 0))
        fit.diverged = not math.isfinite(self.loss)
        if not fit.diverged:
            fit.losses.append((fit.step, self.loss))
            self.total.zero_()

    def finish(self) -> None:
        """Note how steps ran, and save."""
        self.fit.graph = self._steps.graph is not None or self.fit.graph
        if self._steps.note and self._steps.note not in self.fit.notes:
            self.fit.notes.append(self._steps.note)
        if self.path and self.kept != self.fit.step and self.group.main:
            self.save()

    def evaluate(self, split: Split) -> Score:
        """Accuracy on a held-out split, and for each of its slices."""
        if split == "validation" and self.device != "cpu":
            self._validate()
            seen = self._seen
        else:
            with self._steps.on_stream():
                seen = self._scored(split)
        self.wait()
        right, used, groups, targets, losses = (x.cpu() for x in seen)
        most = self.task.available(split) or None  # a finite split starts over in the last batch
        hits, slices = right[used].double()[:most], groups[used][:most]
        constant = float(targets[used][:most].bincount().max()) / len(hits)
        return Score(float(hits.mean()), float(losses.double().mean()), by_slice(hits, slices), constant)

    def _validate(self) -> None:
        try:
            self._looks()
        except torch.OutOfMemoryError as error:
            self._looks.give_up(str(error))
            self._looks()

    def _look(self) -> None:
        self._seen = self._scored("validation")

    def _scored(self, split: Split) -> Seen:
        """Of each target: whether it was met, whether it counts, its slice, itself; and the loss of each batch."""
        training, seen = self.model.training, []
        self.model.eval()
        with torch.no_grad():
            for batch in self.batches.held_out(split):
                loss, scores = self._loss(batch)
                met, counts = scores.argmax(-1) == batch.targets, batch.targets != IGNORED
                found = met, counts, batch.groups, batch.targets, loss.view(1)
                seen.append(tuple(map(self.group.gather, found)))
        self.model.train(training)
        return tuple(torch.cat(parts) for parts in zip(*seen, strict=True))

    def save(self) -> None:
        """Write a checkpoint; where that fails, the last one stands, training goes on and `notes` says so."""
        assert self.path is not None, "a trainer without a path saves nothing"
        self._saved = time.perf_counter()
        try:
            checkpoint.save(self.path, self._state())
            self.kept = self.fit.step
        except UserError as error:
            if str(error) not in self.fit.notes:
                self.fit.notes.append(str(error))

    def _state(self) -> dict[str, Any]:
        return {
            "architecture": self.model.architecture.as_dict(),
            "task": self.task.name,
            "recipe": _plain(asdict(self.recipe)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fit": _plain(asdict(self.fit)),
            "total": self.total,
            "random": _random(self.device),
        }

    def copied(self) -> dict[str, Any]:
        """All that `go_on` needs, on the CPU."""
        found: dict[str, Any] = tree_map(lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x, self._state())
        return found

    def _resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises `UserError` where it is of another model, task or recipe."""
        state = checkpoint.load(path)
        checkpoint.hold(path, "architecture", self.model.architecture.differences(state["architecture"]))
        own = {"task": self.task.name, **_plain(asdict(self.recipe))}
        checkpoint.hold(path, "recipe", differences({"task": state["task"], **state["recipe"]}, own))
        self.go_on(state)
        self.kept = self.fit.step
        self.fit.notes += checkpoint.of_other_code(state, f"{self.kept} steps taken")

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another trainer of the same model, task and recipe, as `copied` or a checkpoint holds it."""
        self.model.load_state_dict(state["model"])
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the very tensor that a captured step reads
        fit = state["fit"]
        self.fit = Fit(**{**fit, **{k: [(int(a), float(b)) for a, b in fit[k]] for k in ("losses", "validation", "judged")}})
        self.total.copy_(state["total"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device != "cpu":
            self._count.fill_(self.fit.step)
            torch.cuda.set_rng_state(state["random"]["cuda"])


def _entropy(scores: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
    if shares is None:
        return cross_entropy(scores.float(), targets)
    return (cross_entropy(scores.float(), targets, reduction="none") * shares).sum()


def _random(device: str) -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if device == "cuda" else {})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """With lists for tuples, as a checkpoint gives them back."""
    return {k: [list(x) if isinstance(x, tuple) else x for x in v] if isinstance(v, list | tuple) else v for k, v in values.items()}
