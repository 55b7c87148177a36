"""Steps that are replayed from a CUDA graph: when they are captured, what happens where they cannot be, and that they change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from training_support import case, model, noise, recipe, task

from attnbench import replay
from attnbench.nn import Architecture, TinyTransformer
from attnbench.race import race
from attnbench.replay import WARM, Replayed
from attnbench.tasks import accuracy, models, trained
from attnbench.train import Recipe, Trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

gpu = pytest.mark.gpu


class Graph:
    """Stands for a captured graph: replaying calls the work again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that is none: streams that do nothing, and waiting that is recorded."""
    seen: dict[str, Any] = {"strict": False, "captured": 0}

    class Strict:
        def __enter__(self) -> None:
            seen["strict"] = True

        def __exit__(self, *_: object) -> None:
            seen["strict"] = False

    def captured(work: Callable[[], None], *_: object) -> Graph:
        seen["captured"] += 1
        if error := seen.get("fails"):
            raise error
        return Graph(work)

    monkeypatch.setattr(replay, "_waiting_is_an_error", Strict)
    monkeypatch.setattr(replay, "_captured", captured)
    monkeypatch.setattr(Replayed, "on_stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", object)
    return seen


def calls(work: Replayed, times: int) -> list[bool]:
    found = []
    for _ in range(times):
        work()
        found.append(work.graph is not None)
    return found


def test_work_is_captured_after_calls_that_warm_it_and_done_once_a_call(fake: dict[str, Any]) -> None:
    done: list[bool] = []
    work = Replayed(lambda: done.append(fake["strict"]), "cuda")
    assert calls(work, 6) == [False] * WARM + [True] * 3
    assert done == [False, False, True, False, False, False], "one call may not wait; a capture itself does nothing"
    assert work.settled
    assert not work.note


def test_work_that_waits_for_the_device_is_never_captured(fake: dict[str, Any]) -> None:
    done = []

    def waits() -> None:
        if fake["strict"]:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        done.append(1)

    work = Replayed(waits, "cuda")
    assert calls(work, 6) == [False] * 6
    assert len(done) == 6, "the call that failed was made again"
    assert work.note == "not captured in a CUDA graph: called a synchronizing CUDA operation"
    assert fake["captured"] == 0


def test_a_capture_that_fails_leaves_work_as_it_is(fake: dict[str, Any]) -> None:
    done = []
    fake["fails"] = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    work = Replayed(lambda: done.append(1), "cuda")
    assert calls(work, 6) == [False] * 6
    assert len(done) == 6
    assert "operation not permitted" in work.note
    assert fake["captured"] == 1


def test_too_little_memory_is_for_the_caller_to_mend(fake: dict[str, Any]) -> None:
    fake["fails"] = torch.OutOfMemoryError("CUDA out of memory")
    work = Replayed(lambda: None, "cuda")
    with pytest.raises(torch.OutOfMemoryError):
        calls(work, 6)


def test_a_reason_given_keeps_work_from_being_captured(fake: dict[str, Any]) -> None:
    work = Replayed(lambda: None, "cuda", "no CUDA graph: counts are read back")
    assert calls(work, 6) == [False] * 6
    assert work.settled
    assert fake == {"strict": False, "captured": 0}


def test_on_a_cpu_work_is_called_and_nothing_else() -> None:
    done = []
    work = Replayed(lambda: done.append(1), "cpu")
    assert calls(work, 5) == [False] * 5
    assert len(done) == 5
    assert work.settled
    work.wait()


# on a GPU


def recall(method: str = "softmax", *, why_eager: str = "", path: Path | None = None, **changes: Any) -> Trainer:
    own = trained.get("mqar")
    torch.manual_seed(0)
    params = {"causal": True} if method == "softmax" else {"landmarks": 4, "topk": 8}
    built = TinyTransformer(
        Architecture(method=method, params=params, vocabulary=own.vocabulary, classes=own.classes, tokens=64, dim=64, heads=2, depth=2,
                     positions="learned", causal=method == "softmax", per_token=True)
    )  # fmt: skip
    settings = Recipe(**{"steps": 40, "rate": 3e-3, "batch": 16, "n": 64, "evaluations": 8, "examples": 256, "target": 2.0, **changes})
    return Trainer(built, own, settings, "cuda", path, why_eager=why_eager)


def weights(own: Trainer) -> torch.Tensor:
    return torch.cat([x.detach().double().flatten() for x in own.model.state_dict().values()])


@gpu
@pytest.mark.parametrize("method", ["softmax", "mita"])
@pytest.mark.parametrize("autocast", [False, True])
def test_replayed_steps_train_as_eager_ones_do(method: str, autocast: bool) -> None:
    eager, again, graph = (recall(method, why_eager=why, autocast=autocast) for why in ("asked for", "asked for", ""))
    start = weights(eager)
    for own in (eager, again, graph):
        own.run()
    assert graph.fit.graph
    assert not eager.fit.graph
    assert not graph.fit.notes
    assert "asked for" in eager.fit.notes[0]
    moved, noise_floor, apart = (float((weights(eager) - other).norm()) for other in (start, weights(again), weights(graph)))
    assert apart <= 4 * noise_floor + 0.01 * moved, "sums by atomics differ from run to run, a wrong step by as much as training moves"
    losses = [[loss for _, loss in own.fit.losses] for own in (eager, graph)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if autocast else 1e-3)
    assert graph.fit.losses[-1][1] < graph.fit.losses[0][1]


@gpu
def test_replayed_steps_follow_the_rate_and_the_batches_of_the_recipe() -> None:
    own = recall(steps=12)
    seen, rates = [], []
    for _ in range(12):
        before = int(own._count)
        own.take(None)
        own.wait()
        seen.append(int(own._count) - before)
        rates.append(float(own.optimizer.param_groups[0]["lr"]))
    assert seen == [1] * 12
    assert own._steps.graph is not None
    assert rates == pytest.approx([own.recipe.rate_at(i) for i in range(12)], rel=1e-5)


@gpu
def test_a_run_on_a_gpu_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = recall()
    whole.run()

    def kill(own: Trainer) -> None:
        if own.fit.step == 20:
            raise KeyboardInterrupt

    first = recall(path=tmp_path / "run.pt")
    first.save_s, first.tell = 0.0, kill
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = recall(path=tmp_path / "run.pt")
    assert second.fit.step == int(second._count) == 20
    second.run()
    assert second.fit.graph
    assert [step for step, _ in second.fit.losses] == [step for step, _ in whole.fit.losses]
    assert [x for _, x in second.fit.losses] == pytest.approx([x for _, x in whole.fit.losses], rel=1e-2)


@gpu
def test_rates_side_by_side_train_as_alone() -> None:
    together = [recall(rate=rate) for rate in (1e-3, 3e-3)]
    race(together)
    alone = [recall(rate=rate) for rate in (1e-3, 3e-3)]
    for own in alone:
        own.run()
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.fit.graph
        assert [x for _, x in mine.fit.losses] == pytest.approx([x for _, x in theirs.fit.losses], rel=1e-2)


@gpu
def test_work_that_waits_is_trained_in_eager_mode_with_a_note() -> None:
    own = recall(steps=12)
    step = own.step
    own.step = lambda batch: _waiting(step, batch)
    own.run()
    assert not own.fit.graph
    assert "not captured in a CUDA graph" in own.fit.notes[0]
    assert own.fit.step == 12


def _waiting(step: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
    float(batch.targets.sum())
    return step(batch)


@gpu
def test_batches_that_come_from_the_host_are_captured_too() -> None:
    plain = [Trainer(model(), task(batch=even), recipe(steps=20), device) for device in ("cuda", "cpu")]
    for own in plain:
        own.run()
    assert plain[0].fit.graph
    assert [x for _, x in plain[0].fit.losses] == pytest.approx([x for _, x in plain[1].fit.losses], rel=1e-3)
    uneven = Trainer(model(per_token=True), task(batch=noise, per_token=True), recipe(steps=20), "cuda")
    uneven.run()
    assert uneven.fit.step == 20
    assert "batches differ in shape" in uneven.fit.notes[0]


def even(split: Any, index: int, size: int, n: int, seed: int) -> Any:
    batch = noise(split, index, size, n, seed)
    return type(batch)(batch.inputs, batch.targets[:, 0], torch.ones_like(batch.mask), batch.groups[:, 0])


@gpu
def test_a_case_on_a_gpu_says_how_it_was_trained(tmp_path: Path) -> None:
    record = accuracy.run(case(rates="0.001/0.01", steps=40, n=64, batch=8), "cuda", tmp_path)
    assert record.training.graph
    assert record.training.together == 2
    assert record.metrics["train_tokens_per_s"] > 0
    assert record.training.recipe["examples"] == models.EXAMPLES
