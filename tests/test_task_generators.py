"""Trained tasks: the same on every machine, without overlap between splits, and by name and level."""

import numpy as np
import pytest
import torch

from attnbench.errors import UserError
from attnbench.tasks import images, trained

SPLITS = ("train", "validation", "test")


DIGESTS = {
    "mqar": "17f0342bf482e1bb",
    "mqar:graded": "b8f984b1031f7f19",
    "listops": "9fa4b3150f554842",
    "pathfinder": "a45a2ece6ac41197",
    "pathfinder:easy": "a53d32d606bf2290",
    "pathfinder:intermediate": "59746dcb564d99ea",
    "pathfinder:graded": "46325f39e2f8cbe6",
}
"""of 5 training examples with seed 0: what was measured on one machine is drawn again on another"""


GENERATED = tuple(DIGESTS)


SIZES = {name: {"mqar": 256, "listops": 512}.get(name.partition(":")[0], 1024) for name in GENERATED}


@pytest.mark.parametrize("name", GENERATED)
def test_a_batch_is_a_pure_function_and_never_changes(name):
    draw = trained.get(name).batch
    first = draw("train", 0, 5, SIZES[name], 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first.digest == draw("train", 0, 5, SIZES[name], 0).digest == DIGESTS[name]
    others = [draw("train", 1, 5, SIZES[name], 0), draw("train", 0, 5, SIZES[name], 1), draw("test", 0, 5, SIZES[name], 0)]
    assert len({x.digest for x in (first, *others)}) == 4


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_example(name):
    draw = trained.get(name).batch
    seen = {split: {x.numpy().tobytes() for i in range(4) for x in draw(split, i, 16, SIZES[name], 0).inputs} for split in SPLITS}
    assert all(len(x) == 64 for x in seen.values()), "an example came twice"
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("name", GENERATED)
def test_batches_look_as_the_task_says(name):
    task = trained.get(name)
    batch = task.batch("train", 3, 7, SIZES[name], 2)
    assert batch.inputs.shape == batch.mask.shape == (7, SIZES[name])
    assert batch.targets.shape == batch.groups.shape == ((7, SIZES[name]) if task.per_token else (7,))
    assert batch.inputs.dtype == batch.targets.dtype == batch.groups.dtype == torch.long
    assert batch.mask.dtype == torch.bool
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.vocabulary
    assert 0 <= batch.targets.min() <= batch.targets.max() < task.classes


def test_only_a_folder_is_a_folder():
    assert [trained.folder(name) for name in ("mqar", "pathfinder:easy", "images", "images:/a/b:c")] == ["", "", "", "/a/b:c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pathfinder:eazy", "unknown level of pathfinder 'eazy': did you mean easy?"),
        ("pathfinder:7", "unknown level of pathfinder '7': choose from easy, graded, hard, intermediate"),
        ("listops:easy", "task listops reads no folder and has no levels: leave out easy"),
    ],
)
def test_a_level_that_does_not_exist_is_one_line(name, message):
    with pytest.raises(UserError) as raised:
        trained.get(name)
    assert str(raised.value) == message


def test_images_need_a_folder():
    with pytest.raises(UserError, match="--data PATH"):
        images.TASK.batch("train", 0, 1, 196, 0)
