"""Training: it learns, it goes on where it was killed, and what goes wrong is a result or one line."""

from __future__ import annotations

import errno
import io
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from training_support import CLASSES, N, architecture, model, noise, recipe, task, thirty_two

from attnbench import checkpoint
from attnbench.errors import UserError
from attnbench.nn import TinyTransformer
from attnbench.slices import by_slice
from attnbench.tasks.trained import Batch
from attnbench.train import Recipe, Trainer

if TYPE_CHECKING:
    from pathlib import Path


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("method", ["softmax", "mita"])
def test_a_tiny_model_learns_32_examples_by_heart(method: str) -> None:
    trainer = Trainer(model(method), task(), recipe(steps=120, rate=1e-2, batch=32, evaluations=12, weight_decay=0.0))
    before = trainer.evaluate("train").accuracy
    fit = trainer.run()
    assert before < 0.6
    assert trainer.evaluate("train").accuracy == 1.0
    assert fit.step < 120, "training stops where the target is reached"
    assert fit.losses[-1][1] < 0.5 * fit.losses[0][1]


def per_token(**changes: object) -> object:
    return task(batch=noise, per_token=True, **changes)


@pytest.mark.parametrize("method", ["softmax", "mita", "performer"])
@pytest.mark.parametrize("at", [4, 7])
def test_a_run_that_was_killed_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, method: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnbench.recipe._POINTS", 4)  # a point every 3 steps, an evaluation every 4
    whole = Trainer(model(method, per_token=True), per_token(), recipe())
    whole.run()
    path = tmp_path / "run.pt"
    first = Trainer(model(method, per_token=True), per_token(), recipe(), path=path, save_s=0.0)

    def kill(_: Trainer) -> None:
        if first.fit.step == at:
            raise KilledError

    first.tell = kill
    with pytest.raises(KilledError):
        first.run()
    second = Trainer(model(method, seed=5, per_token=True), per_token(), recipe(), path=path)
    assert second.fit.step == second.kept == at
    second.run()
    assert {k: v.tolist() for k, v in second.model.state_dict().items()} == {k: v.tolist() for k, v in whole.model.state_dict().items()}
    assert second.fit.losses == whole.fit.losses
    assert second.fit.validation == whole.fit.validation


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit = Trainer(model(per_token=True), per_token(), recipe(), path=path).run()
    again = Trainer(model(per_token=True), per_token(), recipe(), path=path)
    again.step = lambda _: pytest.fail("a step was taken")  # type: ignore[method-assign]
    assert again.run() == fit


def test_steps_that_other_code_took_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr("attnbench.checkpoint.commit", lambda: "before")
        Trainer(model(per_token=True), per_token(), recipe(), path=path).run()
    again = Trainer(model(per_token=True), per_token(), recipe(), path=path)
    assert again.fit.notes == ["12 steps taken at commit before, which a checkpoint holds"]


def test_a_loss_that_is_not_finite_ends_the_run_as_a_result() -> None:
    def poisoned(split, index, size, n, seed) -> Batch:
        batch = thirty_two(split, index, size, n, seed)
        inputs = torch.zeros(size, n, 1) + (math.inf if split == "train" and index == 5 else 0.0)
        return replace(batch, inputs=inputs)

    own = task(batch=poisoned, vocabulary=0, features=1)
    fit = Trainer(model(vocabulary=0, features=1), own, recipe(steps=100, evaluations=50)).run()
    assert fit.diverged
    assert fit.step == 6
    assert fit.reached == 0.0
    assert all(math.isfinite(loss) for _, loss in fit.losses)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": {"depth": 3}}, r"is of another architecture \(depth = 2 there, 3 here\)"),
        ({"model": {"method": "linear"}}, r"method = 'softmax' there, 'linear' here"),
        ({"recipe": {"rate": 1e-4}}, r"is of another recipe \(rate = 0.003 there, 0.0001 here\)"),
        ({"task": {"name": "other"}}, r"task = 'small' there, 'other' here"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path: Path, other: dict, message: str) -> None:
    path = tmp_path / "run.pt"
    Trainer(model(per_token=True), per_token(), recipe(), path=path).run()
    with pytest.raises(UserError, match=message) as raised:
        Trainer(model(**{"per_token": True, **other.get("model", {})}), per_token(**other.get("task", {})),
                recipe(**other.get("recipe", {})), path=path)  # fmt: skip
    assert "\n" not in str(raised.value)


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", saved({"format": 0}), saved([])])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="delete it to train from the start") as raised:
        Trainer(model(per_token=True), per_token(), recipe(), path=path)
    assert "\n" not in str(raised.value)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    trainer = Trainer(model(per_token=True), per_token(), recipe(), path=path)
    trainer.save()
    good = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    fit = trainer.run()
    assert fit.step == 12
    assert path.read_bytes() == good
    assert [x.name for x in tmp_path.iterdir()] == ["run.pt"]
    assert "No space left on device" in fit.notes[0]


def test_a_folder_that_is_a_file_is_one_line_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run.pt"
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(path, {})
    fit = Trainer(model(per_token=True), per_token(), recipe(), path=path).run()
    assert fit.step == 12
    assert len(fit.notes) == 1


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    own = recipe(steps=100, rate=1.0)
    rates = [own.rate_at(step) for step in range(100)]
    assert max(rates) == rates[9] == 1.0
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_matrices_alone_decay() -> None:
    trainer = Trainer(model(), task(), recipe())
    decay, plain = trainer.optimizer.param_groups
    assert {x.ndim for x in decay["params"]} == {2}
    assert {x.ndim for x in plain["params"] if x is not trainer.model.places} == {1}
    assert any(x is trainer.model.places for x in plain["params"])
    assert len(decay["params"]) + len(plain["params"]) == len(list(trainer.model.parameters()))
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_held_out_examples_are_few_beside_those_trained_on() -> None:
    long, short = Recipe(steps=10_000, rate=1e-3, batch=64, n=N), recipe()
    assert (long.batches("validation"), long.batches("test")) == (16, 64)
    assert (short.batches("validation"), short.batches("test")) == (1, 3)
    assert long.batches("test", available=300) == 5


def test_accuracy_is_counted_by_slice_and_where_the_mask_is_set() -> None:
    def graded(split, index, size, n, seed) -> Batch:
        groups = torch.arange(size)[:, None].expand(size, n) % 2
        return Batch(torch.zeros(size, n, dtype=torch.long), groups.clone(), torch.arange(n) < torch.arange(1, size + 1)[:, None], groups)

    own = task(batch=graded, per_token=True)
    trainer = Trainer(model(per_token=True), own, recipe())
    with torch.no_grad():
        trainer.model.head.weight.zero_()
        trainer.model.head.bias.copy_(torch.tensor([1.0] + [0.0] * (CLASSES - 1)))
    score = trainer.evaluate("test")
    assert score.groups == {"0": 1.0, "1": 0.0}
    assert score.accuracy == pytest.approx((1 + 3 + 5 + 7) / sum(range(1, 9)))
    assert score.constant == pytest.approx((2 + 4 + 6 + 8) / sum(range(1, 9)))


def test_many_slices_are_told_as_ranges() -> None:
    slices = torch.arange(800)
    found = by_slice((slices >= 400).double(), slices)
    assert list(found.values()) == [0.0] * 4 + [1.0] * 4
    assert next(iter(found)).startswith("0-")


def test_what_the_models_of_two_methods_do_not_share_is_counted() -> None:
    plain, learned = model("softmax"), TinyTransformer(replace(architecture("linformer"), params={"rank": 4}))
    assert plain.mixing_count == 0
    assert learned.mixing_count > 0
    assert learned.parameter_count - learned.mixing_count == plain.parameter_count == sum(x.numel() for x in plain.parameters())
    shared = {k: v.shape for k, v in learned.state_dict().items() if ".operator." not in k}
    assert shared == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("places", ["learned", "rotary", "none"])
@pytest.mark.parametrize("grid", [None, (4, 4)])
@pytest.mark.parametrize("class_token", [True, False])
def test_models_of_every_form_run_and_only_positions_break_the_symmetry(places: str, grid, class_token: bool) -> None:
    own = model(positions=places, grid=grid, class_token=class_token).double()
    inputs = torch.randint(32, (3, N))
    moved = own(inputs.flip(1))
    assert moved.shape == (3, CLASSES)
    assert torch.allclose(moved, own(inputs)) == (places == "none")


def test_padding_does_not_count_in_the_mean() -> None:
    own = model()
    inputs, mask = torch.randint(32, (2, N)), torch.arange(N)[None] < torch.tensor([[N], [3]])
    x = own.features(inputs)
    want = own.head(torch.stack([x[0].mean(0), x[1, :3].mean(0)]))
    torch.testing.assert_close(own(inputs, mask=mask), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"vocabulary": 0}, "set vocabulary or features"), ({"class_token": True, "per_token": True}, "leave out class_token, or per_token")],
)
def test_a_model_that_makes_no_sense_is_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model(**changes)
