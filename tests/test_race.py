"""Rates that train side by side: the same result as one after another, whatever is killed in between."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import torch
from training_support import model, noise, recipe, task

from attnbench.race import _next_size, _stop, learned, race, ranked
from attnbench.recipe import Score
from attnbench.tasks import learning
from attnbench.train import Trainer

if TYPE_CHECKING:
    from pathlib import Path

RATES = (1e-4, 1e-2, 3e-2)


def settings(rate: float, **changes: object) -> object:
    return recipe(steps=60, rate=rate, batch=32, evaluations=12, weight_decay=0.0, **changes)


def trainer(rate: float, folder: Path | None = None, **changes: object) -> Trainer:
    path = folder / f"{rate:g}.pt" if folder else None
    return Trainer(model(), task(), settings(rate, **{"target": 0.9, **changes}), path=path, save_s=0.0)


def in_turn_of(rates: tuple[float, ...], folder: Path | None = None, **changes: object) -> learning.Outcome:
    same = settings(1.0, **{"target": 0.9, **changes})
    return learning._in_turn(lambda rate: trainer(rate, folder, **changes), rates, same, task())


def curves(fits: list) -> list:
    return [(fit.step, fit.losses, fit.validation) for fit in fits]


def test_side_by_side_is_one_after_another() -> None:
    together = [trainer(rate) for rate in RATES]
    end = race(together).step
    assert end < 60, "it ends where the first reaches the target"
    assert {t.fit.step for t in together} == {end}
    assert max(t.fit.reached for t in together) >= 0.9
    in_turn = in_turn_of(RATES)
    assert curves(in_turn.fits) == curves([t.fit for t in together])
    chosen = learning._chosen([t.fit for t in together], [t.model.state_dict() for t in together])
    assert chosen.best == in_turn.best
    assert chosen.fits[chosen.best].reached == max(fit.reached for fit in chosen.fits)
    assert all(torch.equal(x, in_turn.state[name]) for name, x in chosen.state.items())


@pytest.mark.parametrize("at", [5, 7])
def test_a_race_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    whole = [trainer(rate) for rate in RATES]
    race(whole)

    def kill(own: Trainer) -> None:
        if own.fit.step == at:
            raise KeyboardInterrupt

    first = [trainer(rate, tmp_path) for rate in RATES]
    first[1].tell = kill  # the first has saved this step, the last has not
    with pytest.raises(KeyboardInterrupt):
        race(first)
    second = [trainer(rate, tmp_path) for rate in RATES]
    assert [t.fit.step for t in second] == [at, at, at - 1]
    race(second)
    assert curves([t.fit for t in second]) == curves([t.fit for t in whole])
    for mine, theirs in zip(second, whole, strict=True):
        assert all(torch.equal(x, theirs.model.state_dict()[name]) for name, x in mine.model.state_dict().items())
    assert curves([t.fit for t in [trainer(rate, tmp_path) for rate in RATES]]) == curves([t.fit for t in whole]), "the end is saved"


def test_a_rate_that_diverges_leaves_the_others_in_the_race() -> None:
    own = [Trainer(model(per_token=True), task(batch=noise, per_token=True), recipe(rate=rate)) for rate in (1e-3, 2e-3)]
    step = own[1].step
    own[1].step = lambda batch: step(batch) * float("nan" if own[1].fit.step == 5 else 1)
    assert race(own).step == 12
    assert [(t.fit.diverged, t.fit.step) for t in own] == [(False, 12), (True, 6)]
    chosen = learning._chosen([t.fit for t in own], [{}, {}])
    assert chosen.best == 0


def test_models_side_by_side_share_each_batch() -> None:
    drawn = []

    def counting(split, index, size, n, seed):
        drawn.append((split, index))
        return noise(split, index, size, n, seed)

    shared = task(batch=counting, per_token=True)
    first = Trainer(model(per_token=True), shared, recipe(rate=1e-3))
    race([first, Trainer(model(per_token=True), shared, recipe(rate=2e-3), data=first.batches)])
    assert [index for split, index in drawn if split == "train"] == list(range(12))


def test_the_host_looks_at_every_point_and_waits_for_a_gpu_about_once_a_second() -> None:
    own = trainer(1e-3)
    own.device = "cuda"
    own.recipe = recipe(steps=1000, evaluations=20)  # a point every 10 steps, an evaluation every 50
    stops = []
    while own.fit.step < 60:
        own.fit.step = _stop(own, 8)
        stops.append(own.fit.step)
    assert stops == [8, 10, 18, 20, 28, 30, 38, 40, 48, 50, 58, 60]
    assert [_next_size(16, s) for s in (0.1, 0.5, 2.0)] == [32, 16, 8]
    assert _next_size(64, 0.1) == 64
    assert _next_size(1, 60.0) == 1


def test_after_the_cut_only_the_best_goes_on_side_by_side_as_in_turn(tmp_path: Path) -> None:
    together = [trainer(rate, target=2.0) for rate in RATES]
    assert race(together).step == 60
    steps = [t.fit.step for t in together]
    assert sorted(steps) == [20, 20, 60]
    best = steps.index(60)
    losses = [t.fit.loss_at(20) for t in together]
    assert losses[best] == min(losses)
    for path in (None, tmp_path):
        in_turn = in_turn_of(RATES, path, target=2.0)
        assert curves(in_turn.fits) == curves([t.fit for t in together])
        assert in_turn.best == best
        assert all(torch.equal(x, in_turn.state[name]) for name, x in together[best].model.state_dict().items())


@pytest.mark.parametrize("at", [0, 20, 25, 30, 50])
def test_as_long_as_none_does_better_than_a_guess_all_go_on(tmp_path: Path, at: int) -> None:
    slow = (1e-5, 5e-5, 1e-4)
    together = [trainer(rate, target=2.0) for rate in slow]
    assert race(together).step == 60
    assert [t.fit.step for t in together] == [30, 30, 60]
    assert together[-1].fit.accuracy_at(25) < 0.48 < together[-1].fit.accuracy_at(30)

    def kill(own: Trainer) -> None:
        if own.fit.step == at:
            raise KeyboardInterrupt

    first = [trainer(rate, tmp_path, target=2.0) for rate in slow]
    first[-1].tell = kill
    with pytest.raises(KeyboardInterrupt) if at else contextlib.nullcontext():
        race(first)
    in_turn = in_turn_of(slow, tmp_path, target=2.0)
    assert curves(in_turn.fits) == curves([t.fit for t in together])


@pytest.mark.parametrize(("accuracy", "told"), [(0.25, False), (0.47, False), (0.49, True)])
def test_a_guess_is_told_from_what_was_learned(accuracy: float, told: bool) -> None:
    own = trainer(1e-3)
    own.fit.validation = [(5, 1.0), (10, accuracy), (15, 0.0)]
    assert (own.task.chance, own.recipe.batches("validation") * own.recipe.batch) == (0.25, 32)
    assert learned(own.fit, own.recipe, own.task, 12) is told
    assert learned(own.fit, own.recipe, own.task, 9)
    assert not learned(own.fit, own.recipe, own.task, 4)
    own.fit.validation[1] = (10, 0.6)
    own.fit.constant = 0.5  # what one answer to all would reach
    assert not learned(own.fit, own.recipe, own.task, 12)
    own.fit.constant = 0.3
    assert learned(own.fit, own.recipe, own.task, 12)
    own.fit.step, own.fit.diverged = 12, True
    assert not learned(own.fit, own.recipe, own.task, 12)
    assert learned(own.fit, own.recipe, own.task, 11), "before it diverged"


@pytest.mark.parametrize("at", [10, 20, 33])
def test_a_race_that_was_killed_before_or_after_the_cut_ends_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    whole = [trainer(rate, target=2.0) for rate in RATES]
    race(whole)
    best = [t.fit.step for t in whole].index(60)

    def kill(own: Trainer) -> None:
        if own.fit.step == at:
            raise KeyboardInterrupt

    first = [trainer(rate, tmp_path, target=2.0) for rate in RATES]
    first[best].tell = kill
    with pytest.raises(KeyboardInterrupt):
        race(first)
    second = [trainer(rate, tmp_path, target=2.0) for rate in RATES]
    assert second[best].fit.step == at
    race(second)
    assert curves([t.fit for t in second]) == curves([t.fit for t in whole])
    third = in_turn_of(RATES, tmp_path, target=2.0)
    assert curves(third.fits) == curves([t.fit for t in whole]), "in turn, from checkpoints that are beyond the cut"


def test_where_the_best_diverges_after_the_cut_the_next_best_goes_on() -> None:
    own = [Trainer(model(per_token=True), task(batch=noise, per_token=True), recipe(rate=rate)) for rate in (1e-3, 2e-3)]
    best = 1
    step = own[best].step
    own[best].step = lambda batch: step(batch) * float("nan" if own[best].fit.step == 7 else 1)
    assert race(own).step == 12
    assert [(t.fit.diverged, t.fit.step) for t in own] == [(False, 12), (True, 8)]
    assert learning._chosen([t.fit for t in own], [{}, {}]).best == 0


@pytest.mark.parametrize(
    ("rung", "steps", "cut"), [(1 / 3, 12, 4), (0.01, 12, 4), (0.5, 12, 8), (1.0, 12, 12), (1.0, 41, 41), (1 / 3, 1, 1)]
)
def test_the_cut_is_at_an_evaluation_or_the_end(rung: float, steps: int, cut: int) -> None:
    assert recipe(rung=rung, steps=steps).cut == cut


def forged(scores: dict[float, Score], folder: Path | None = None) -> list[Trainer]:
    """Trainers whose scores on the validation split are given, by rate, from the start."""
    made = [trainer(rate, folder) for rate in scores]
    for own in made:
        own.evaluate = lambda _, score=scores[own.recipe.rate]: score  # type: ignore[method-assign]
    return made


def test_a_target_that_is_reached_at_the_cut_ends_the_race_there_whoever_has_the_smaller_loss() -> None:
    scores = {1e-3: Score(0.95, 1.0), 1e-2: Score(0.5, 0.5)}
    own = forged(scores)
    for one in own:
        one.evaluate = lambda _, one=one: scores[one.recipe.rate] if one.fit.step >= 20 else Score(0.0, 2.0)  # type: ignore[method-assign]
    assert race(own).step == 20
    assert [t.fit.step for t in own] == [20, 20]
    assert learning._chosen([t.fit for t in own], [{}, {}]).best == 0


def test_a_validation_loss_that_is_not_finite_ranks_last() -> None:
    own = forged({1e-4: Score(0.8, 2.0), 1e-3: Score(0.8, float("nan")), 1e-2: Score(0.8, 1.0)})
    assert race(own).step == 60
    assert [t.fit.step for t in own] == [20, 20, 60]
    assert ranked([t.fit for t in own], 20) == [2, 0, 1]


def test_one_that_went_farther_in_turn_is_judged_where_the_race_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race(forged({1e-3: Score(0.1, 0.1)}, tmp_path), 20)
    made = forged({1e-3: Score(0.5, 0.1), 1e-2: Score(0.95, 0.2)}, tmp_path)
    made[0].fit.validation = [(step, 0.97 if step == 20 else 0.1) for step, _ in made[0].fit.validation]
    monkeypatch.setattr(learning, "_weights", lambda own: {})
    outcome = learning._side_by_side(lambda rate: next(t for t in made if t.recipe.rate == rate), [1e-3, 1e-2])
    assert outcome.best == 1
    assert [fit.step for fit in outcome.fits] == [5, 5]


def test_steps_that_the_last_run_added_after_the_cut_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(learning, "report", told.append)
    monkeypatch.setattr(learning, "_TELL_S", 0.0)
    own = [trainer(rate) for rate in RATES]
    for one, kept in zip(own, (20, 33, 20), strict=True):
        one.kept = one.fit.step = kept
    show = learning._Report(settings(1e-3), 3)
    for one in own:
        show.watch(one)
    own[1].kept = own[1].fit.step = 50
    show(own[1])
    show.watch(own[1])  # in turn it comes back once more
    show(own[1])
    assert [(p.done, p.total, p.kept, p.gained) for p in told[1:]] == [(90, 100, 90, True)] * 2


@pytest.mark.parametrize(("heard", "total"), [((), 100), ((60, 60, 3), 180), ((30, 45, 30), 120), ((20, 60, 20), 100), ((25, 20, 20), 100)])
def test_models_that_go_on_together_have_more_steps_before_them(heard: tuple[int, ...], total: int) -> None:
    show = learning._Report(settings(1e-3), 3)
    show.heard = {float(i): (step, 0, 0.0, 0.0) for i, step in enumerate(heard)}
    assert show.total == total


def test_the_rung_of_one_lets_all_rates_go_to_the_end() -> None:
    own = [trainer(rate, target=2.0, rung=1.0) for rate in RATES]
    race(own)
    assert [t.fit.step for t in own] == [60, 60, 60]
