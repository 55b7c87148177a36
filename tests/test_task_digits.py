"""Digits: every image once an epoch, resized, balanced, in splits that do not change."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from attnbench.errors import UserError
from attnbench.tasks import digits


@pytest.fixture
def handwriting(monkeypatch):
    """A stand-in of the data set, of the same size and range, where scikit-learn is absent; 17 grey levels that tell images apart."""
    rng = np.random.default_rng(0)
    data = SimpleNamespace(images=rng.integers(0, 17, (1797, 8, 8)).astype(float), target=np.arange(1797) % 10)
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda: data
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    digits._load.cache_clear()
    yield data
    digits._load.cache_clear()


def test_digits_go_once_through_every_image_of_a_split_in_an_epoch():
    seen = {split: np.concatenate([digits.places(split, i, 50, 3) for i in range(count // 50)]) for split, count in digits.SIZES.items()}
    assert {split: len(set(x.tolist())) for split, x in seen.items()} == {"train": 1150, "validation": 300, "test": 300}
    assert not set(seen["train"].tolist()) & set(seen["test"].tolist())
    assert not set(seen["validation"].tolist()) & set(seen["test"].tolist())
    epochs = [digits.places("train", epoch, 1197, 3) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert not np.array_equal(*epochs)
    assert np.array_equal(digits.places("test", 0, 300, 0), digits.places("test", 1, 300, 9)), "the split is fixed"


def test_digits_at_their_own_size_are_the_images_and_larger_ones_lie_between_them(handwriting):
    batch = digits.TASK.batch("test", 0, 20, 64, 0)
    chosen = digits.places("test", 0, 20, 0)
    assert torch.equal(batch.inputs.reshape(20, 8, 8), torch.from_numpy(handwriting.images[chosen] / 8 - 1).float())
    assert batch.targets.tolist() == handwriting.target[chosen].tolist()
    larger = digits.TASK.batch("test", 0, 20, 1024, 0).inputs.reshape(20, 32, 32)
    at = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)  # where the middle of a new pixel lies among the old ones
    weights = torch.from_numpy(np.stack([np.interp(at, np.arange(8), row) for row in np.eye(8)], 1)).float()
    torch.testing.assert_close(larger, weights @ batch.inputs.reshape(20, 8, 8) @ weights.T)
    assert batch.digest == digits.TASK.batch("test", 0, 20, 64, 5).digest


def test_digits_without_the_package_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'attnbench\[tasks\]'"):
        digits.TASK.batch("train", 0, 1, 64, 0)


def test_digits_are_balanced_in_every_split():
    pytest.importorskip("sklearn", reason="the real images come with scikit-learn, which no other test needs")
    digits._load.cache_clear()
    for split, count in digits.SIZES.items():
        shares = torch.bincount(digits.TASK.batch(split, 0, count, 64, 0).targets, minlength=10) / count
        assert shares.min() > 0.07
        assert shares.max() < 0.13
