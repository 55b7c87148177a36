"""Swap-in: a model that was trained with one method is judged with another in its place."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from training_support import architecture, case, model

from attnbench.errors import UserError
from attnbench.nn import TinyTransformer
from attnbench.record import Status
from attnbench.tasks import accuracy, learning, swapped

if TYPE_CHECKING:
    from pathlib import Path

    from attnbench.case import Case


def test_swapping_a_method_for_itself_changes_nothing(tmp_path: Path) -> None:
    plain = accuracy.run(case(steps=12), "cpu")
    same = accuracy.run(case(steps=12, trained_with="softmax"), "cpu", tmp_path)
    assert same.metrics["test_loss"] == plain.metrics["test_loss"]
    assert same.metrics["accuracy"] == same.metrics["accuracy_before"] == plain.metrics["accuracy"]


def test_experts_that_hold_every_token_are_softmax_and_few_are_not(tmp_path: Path) -> None:
    def loss(**params: object) -> float:
        own = case("mita", {"shared": False, **params}, trained_with="softmax", steps=12)
        return float(accuracy.run(own, "cpu", tmp_path).metrics["test_loss"])

    plain = accuracy.run(case(steps=12), "cpu").metrics["test_loss"]
    # the same sums in another order: a few roundings of float32
    assert loss(landmarks=4, topk=16) == pytest.approx(plain, rel=16 * torch.finfo(torch.float32).eps * 16)
    assert loss(landmarks=4, topk=1) != pytest.approx(plain, rel=1e-6)


def test_swap_ins_train_their_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy.run(case("topk", {"topk": 4}, trained_with="softmax"), "cpu", tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".pt", ".lock"}
    monkeypatch.setattr(learning, "train", lambda *_: pytest.fail("the model was trained again"))
    record = accuracy.run(case("linformer", {"rank": 4}, trained_with="softmax"), "cpu", tmp_path)
    assert record.status is Status.OK
    assert "as initialised" in record.training.notes[0]
    (trial,) = record.training.trials
    assert (trial.steps, trial.losses, trial.validation) == (4, (), ()), "curves stand in the record of the model itself"
    (own,) = accuracy.run(case(trained_with="softmax"), "cpu", tmp_path).training.trials
    assert own.losses
    assert own.validation[-1][0] == 4


def test_a_model_that_other_code_trained_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("attnbench.checkpoint.commit", lambda: "before")
        accuracy.run(case(trained_with="softmax"), "cpu", tmp_path)
    record = accuracy.run(case("topk", {"topk": 4}, trained_with="softmax"), "cpu", tmp_path)
    assert record.training.notes == ("trained at commit before, which a checkpoint holds",)


@pytest.mark.parametrize(("kind", "left"), [("small", set()), ("deit", {"{}.old", "{}.pt.old"})])
def test_a_case_that_is_forgotten_loses_no_model_of_a_long_recipe(tmp_path: Path, kind: str, left: set[str]) -> None:
    one = case("topk", {"topk": 4}, trained_with="softmax", recipe=kind)
    name, other = swapped.base(one).case_id, tmp_path / "other"
    for count in ("first", "second"):
        for path in (tmp_path / name, other):
            path.mkdir(exist_ok=True)
            (path / "0.001.pt").write_text(count)
        (tmp_path / f"{name}.pt").write_text(count)
        swapped.forget(one, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"other", *(x.format(name) for x in left)}
    for path in left:
        found = tmp_path / path.format(name)
        assert (found / "0.001.pt" if found.is_dir() else found).read_text() == "second"


def test_a_cell_waits_for_the_model_that_another_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, trained, begun = learning.train, [], threading.Event()

    def slow(origin: Case, *others: Any) -> Any:
        trained.append(origin)
        begun.set()
        time.sleep(0.3)  # in which the other would have begun too
        return train(origin, *others)

    monkeypatch.setattr(learning, "train", slow)
    records = []

    def run(method: str) -> None:
        records.append(accuracy.run(case(method, trained_with="softmax"), "cpu", tmp_path))

    cells = [threading.Thread(target=run, args=(method,)) for method in ("linear", "softmax")]
    cells[0].start()
    begun.wait(60)
    cells[1].start()
    for cell in cells:
        cell.join()
    assert [r.status for r in records] == [Status.OK, Status.OK]
    assert len(trained) == 1
    assert len({r.metrics["accuracy_before"] for r in records}) == 1


def test_the_reverse_swap_drops_what_the_other_method_learned() -> None:
    learned = TinyTransformer(replace(architecture("linformer"), params={"rank": 4}))
    target = model(seed=1)
    assert swapped.transplant(learned.state_dict(), target) == []
    assert all(torch.equal(x, learned.state_dict()[name]) for name, x in target.state_dict().items())
    assert swapped.transplant(target.state_dict(), learned)
    with pytest.raises(UserError, match=r"weights are of another model .*give both the same width"):
        swapped.transplant(model(dim=32).state_dict(), model())
    with pytest.raises(UserError, match="weights are of another model"):
        swapped.transplant(model(depth=3).state_dict(), model())
