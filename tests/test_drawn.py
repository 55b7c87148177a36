"""Sets of examples: the same as the batches they come from, in the order of the recipe, whoever draws them and whoever reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_support import model, noise, recipe, task

from attnbench import drawn
from attnbench.batches import IGNORED, Prepared, prepared
from attnbench.data import Data, order
from attnbench.drawn import Key
from attnbench.tasks import trained
from attnbench.train import Recipe, Trainer

if TYPE_CHECKING:
    from pathlib import Path

CASES = {"mqar": 64, "listops": 64, "pathfinder": 256, "pathfinder:easy": 256}


def counted(batch: Prepared) -> dict[str, torch.Tensor]:
    """What a model is asked, without the places that only fill a shape."""
    used = batch.targets != IGNORED
    own = {"inputs": batch.inputs, "targets": batch.targets[used], "groups": batch.groups[used]}
    own |= {} if batch.positions is None else {"positions": batch.positions[used]}
    return own | ({} if batch.mask is None else {"mask": batch.mask})


def same(a: Prepared, b: Prepared) -> bool:
    left, right = counted(a), counted(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def small(name: str, **changes: object) -> Recipe:
    return Recipe(**{"steps": 5, "rate": 1e-3, "batch": 8, "n": CASES[name], "seed": 3, "examples": 40, **changes})


@pytest.mark.parametrize("name", CASES)
def test_picked_batches_are_those_that_are_drawn(name: str) -> None:
    own, r = trained.get(name), small(name)
    data = Data(own, r, "meta")  # anything that is no CPU has a set
    assert data.stored
    examples, rows = drawn.load(own, Key("train", r.n, r.seed, r.batch, 40)), order(own, r)
    slots = examples.slots(rows)
    picked = [examples.pick(part, slots) for part in rows]
    assert all(same(batch, prepared(own, "train", i, r)) for i, batch in enumerate(picked))
    assert len({(x.inputs.shape, x.targets.shape) for x in picked}) == 1, "one shape, for a CUDA graph"
    assert picked[0].inputs.dtype == torch.long


def test_a_model_scores_picked_batches_as_drawn_ones() -> None:
    from training_support import model

    own = model(per_token=True, vocabulary=8192, classes=8192, tokens=64)
    r, recall = small("mqar"), trained.get("mqar")
    examples = drawn.load(recall, Key("train", r.n, r.seed, r.batch, 40))
    plain, picked = prepared(recall, "train", 1, r), examples.pick(torch.arange(8, 16), 300)
    assert len(picked.targets) == 300 > len(plain.targets)
    losses = [torch.nn.functional.cross_entropy(own(b.inputs, b.positions, b.mask), b.targets) for b in (plain, picked)]
    torch.testing.assert_close(losses[1], losses[0])


def test_examples_count_the_same_however_much_they_ask_for() -> None:
    """Shares of the loss, of batches as drawn and as picked with room for more, against the mean of means."""
    own, settings = trained.get("mqar:graded"), small("mqar", n=64)
    picked = Data(own, replace(settings, steps=50), "cpu").picked(torch.tensor(2))
    plain = prepared(own, "train", 2, settings)
    assert len(picked.targets) > len(plain.targets)
    for batch in (plain, picked):
        losses = torch.rand(len(batch.targets))
        rows, used = batch.positions // 64, batch.targets != IGNORED
        means = [losses[used & (rows == row)].mean() for row in range(8)]
        torch.testing.assert_close((losses * batch.shares()).sum(), torch.stack(means).mean())


def test_a_task_whose_examples_count_the_same_is_trained_so() -> None:
    def loss(alike: bool) -> float:
        own = model(per_token=True)
        trainer = Trainer(own, task(batch=noise, per_token=True, alike=alike), recipe(steps=1))
        batch = prepared(trainer.task, "train", 0, trainer.recipe)
        shares = batch.shares() if alike else torch.full((len(batch.targets),), 1 / len(batch.targets))
        want = (cross_entropy(own(batch.inputs, batch.positions), batch.targets, reduction="none") * shares).sum()
        got = trainer.step(batch)
        torch.testing.assert_close(got, want.detach())
        return float(got)

    assert loss(alike=True) != loss(alike=False)


def test_a_set_is_gone_through_whole_and_in_another_order_each_time() -> None:
    r = small("listops", steps=7, batch=8, examples=20)
    rows = order(trained.get("listops"), r).flatten()
    epochs = [rows[:20].tolist(), rows[20:40].tolist()]
    assert epochs[0] == list(range(20))
    assert sorted(epochs[1]) == epochs[0] != epochs[1]
    assert len(set(rows[40:].tolist())) == 16, "the last epoch is cut short"
    assert torch.equal(rows, order(trained.get("listops"), replace(r, rate=1.0)).flatten()), "the same for every rate"
    assert not torch.equal(rows, order(trained.get("listops"), replace(r, seed=4)).flatten())
    assert order(trained.get("listops"), r).shape == (7, 8)


def test_a_cpu_draws_as_it_goes_until_the_set_begins_anew() -> None:
    own, r = task(batch=noise, per_token=True), recipe(steps=6, batch=8, examples=48)
    assert not Data(own, r).stored
    again = replace(r, examples=24)
    data = Data(own, again)
    assert data.stored
    with data.batches(0) as batches:
        seen = [next(batches) for _ in range(6)]
    assert all(same(seen[i], prepared(own, "train", i, r)) for i in range(3))
    assert not same(seen[3], seen[0])
    first, second = (torch.cat([b.inputs for b in part]).sum(1).sort().values for part in (seen[:3], seen[3:]))
    assert torch.equal(first, second), "the same examples"
    with data.batches(4) as batches:
        assert same(next(batches), seen[4]), "a batch depends on its number alone"


@pytest.mark.parametrize(("name", "n", "count"), [("mqar", 16, 64), ("mqar", 16, 61), ("pathfinder:easy", 256, 64)])
def test_parts_drawn_by_several_processes_are_the_whole(name: str, n: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, key = trained.get(name), Key("validation", n, 0, 4, count)
    alone = drawn.load(own, key)
    monkeypatch.setattr(drawn, "_WORTH", 8)
    monkeypatch.setattr(drawn.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(drawn, "part", lambda *_: pytest.fail("drawn in this process"))
    together = drawn.load(own, key)
    assert alone.tensors().keys() == together.tensors().keys()
    assert all(torch.equal(x, together.tensors()[name]) for name, x in alone.tensors().items())
    assert len(together.inputs) == count
    assert together.inputs.dtype == (torch.int16 if name == "mqar" else torch.uint8)


def test_a_set_is_drawn_once_and_read_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, key = task(batch=noise), Key("train", 16, 0, 4, 24)
    first = drawn.load(own, key, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(drawn, "_drawn", lambda *_: pytest.fail("drawn again"))
        again = drawn.load(own, key, tmp_path)
    assert torch.equal(again.inputs, first.inputs)
    calls = []
    other = task(batch=lambda split, index, size, n, seed: calls.append(index) or noise(split, index, size, n, seed + 1))
    assert not torch.equal(drawn.load(other, key, tmp_path).inputs, first.inputs), "another generator has a file of its own"
    assert len(list(tmp_path.glob("*.pt"))) == 2
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"torn")
    assert torch.equal(drawn.load(own, key, tmp_path).inputs, first.inputs)


def test_each_level_of_a_task_has_a_file_of_its_own(tmp_path: Path) -> None:
    key, names = Key("train", 256, 0, 4, 8), ("pathfinder", "pathfinder:easy", "pathfinder:intermediate")
    sets = [drawn.load(trained.get(name), key, tmp_path).inputs for name in names]
    again = [drawn.load(trained.get(name), key, tmp_path).inputs for name in names]
    assert all(torch.equal(a, b) for a, b in zip(sets, again, strict=True))
    assert not torch.equal(sets[0], sets[1])
    assert not torch.equal(sets[1], sets[2])
    files = sorted(path.name.partition("-256-")[0] for path in tmp_path.glob("*.pt"))
    assert files == ["pathfinder", "pathfinder-easy", "pathfinder-intermediate"]


def test_a_folder_that_takes_no_file_costs_time_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert len(drawn.load(task(batch=noise), Key("train", 16, 0, 4, 8), tmp_path / "file" / "drawn").inputs) == 8


def test_a_process_that_cannot_draw_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench.errors import UserError

    monkeypatch.setattr(drawn, "_WORTH", 2)
    monkeypatch.setattr(drawn.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(drawn.Key, "batches", property(lambda _: 8))
    broken = replace(trained.get("mqar"))
    monkeypatch.setattr(drawn.trained, "get", lambda _: broken)
    with pytest.raises(UserError, match=r"examples of mqar could not be drawn: .*even N"):
        drawn._drawn(broken, Key("train", 15, 0, 4, 32))
